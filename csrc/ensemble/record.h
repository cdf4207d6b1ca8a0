// Records of accepted steps: entries in blocks of memory, each linked to the one before it of the same sample.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace aca {

// An accepted step from t to t_next, computed with h, and the outputs that it reached, `first_due` to `end_due`.
struct Entry {
    double t, h, t_next;
    int64_t first_due, end_due : 62;
    uint64_t starts_at_jump : 1, ends_at_jump : 1;
    const void* state;  // at its start, where states are kept
    const Entry* previous;
};

// Memory that one thread takes piece by piece.
class Block {
  public:
    void* add(size_t bytes) {
        bytes = (bytes + sizeof(double) - 1) / sizeof(double) * sizeof(double);
        if (left_ < bytes) {
            size_t size = kBytes << (parts_.size() < 6 ? parts_.size() : 6);  // small batches stay small
            if (size < bytes) size = bytes;
            parts_.emplace_back(new char[size]);
            next_ = parts_.back().get();
            left_ = size;
        }
        left_ -= bytes;
        return std::exchange(next_, next_ + bytes);
    }

  private:
    static constexpr size_t kBytes = 1 << 14;
    std::vector<std::unique_ptr<char[]>> parts_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

enum class Keep : int { nothing, steps, states };

// The accepted steps of a batch. Its chunks of samples are independent of one another.
struct Record {
    Record(int64_t samples, int64_t chunks, Keep what)
        : keep(what),
          entries(what == Keep::nothing ? 0 : size_t(chunks)),
          states(what == Keep::states ? size_t(chunks) : 0),
          last(what == Keep::nothing ? 0 : size_t(samples), nullptr) {}

    Keep keep;
    std::vector<Block> entries, states;  // of each chunk
    std::vector<const Entry*> last;      // of each sample
};

}  // namespace aca
