// Records of accepted steps: entries in blocks of memory, each linked to the one before it of the same sample.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace aca {

// An accepted step from t to t_next, computed with h, and the outputs that it reached, `first_due` to `end_due`. The
// state at its start follows it in memory where states are kept.
struct Entry {
    double t, h, t_next;
    int64_t first_due, end_due;
    const Entry* previous;

    template <typename T>
    const T* state() const {
        return reinterpret_cast<const T*>(this + 1);
    }
};

// Entries that one thread adds.
class Block {
  public:
    Entry* add(size_t bytes) {
        bytes = (bytes + sizeof(double) - 1) / sizeof(double) * sizeof(double);
        if (left_ < bytes) {
            size_t size = kBytes << (parts_.size() < 6 ? parts_.size() : 6);  // small batches stay small
            if (size < bytes) size = bytes;
            parts_.emplace_back(new char[size]);
            next_ = parts_.back().get();
            left_ = size;
        }
        Entry* const entry = reinterpret_cast<Entry*>(next_);
        next_ += bytes;
        left_ -= bytes;
        return entry;
    }

  private:
    static constexpr size_t kBytes = 1 << 14;
    std::vector<std::unique_ptr<char[]>> parts_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

// The accepted steps of a batch. Its chunks of samples are independent of one another.
struct Record {
    Record(int64_t samples, int64_t chunks, bool states)
        : keeps_states(states), blocks(size_t(chunks)), last(size_t(samples), nullptr) {}

    bool keeps_states;
    std::vector<Block> blocks;
    std::vector<const Entry*> last;  // of each sample
};

}  // namespace aca
