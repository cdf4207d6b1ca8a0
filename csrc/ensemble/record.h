// Records of accepted steps: entries in blocks of memory, each linked to the one before it of the same sample.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>

#include "ensemble/array.h"

namespace aca {

// An accepted step from t to t_next, computed with h, and the outputs that it reached, `first_due` to `end_due`.
struct Entry {
    double t, h, t_next;
    int64_t first_due, end_due : 62;
    uint64_t starts_at_jump : 1, ends_at_jump : 1;
    const void* state;  // at its start, where states are kept
    const Entry* previous;
};

// Parts of memory that records gave back, for those of later solves. The system gives memory page by page, which takes
// up to a tenth of a solve on two threads.
class Spare {
  public:
    static constexpr int kUsual = 6;  // the largest size that is kept

    static constexpr size_t bytes_of(int size) { return size_t(1) << (14 + size); }

    char* take(int size) {
        if (size <= kUsual) {
            lock();
            Part* const found = first_[size];
            if (found) {
                first_[size] = found->next;
                bytes_ -= bytes_of(size);
            }
            unlock();
            if (found) return reinterpret_cast<char*>(found);
        }
        return new char[bytes_of(size)];
    }

    void give(char* memory, int size) {
        bool is_kept = false;
        if (size <= kUsual) {
            lock();
            is_kept = bytes_ + bytes_of(size) <= kMost;
            if (is_kept) {
                first_[size] = new (memory) Part{first_[size]};
                bytes_ += bytes_of(size);
            }
            unlock();
        }
        if (!is_kept) delete[] memory;
    }

  private:
    struct Part {
        Part* next;
    };

    static constexpr size_t kMost = size_t(1) << 26;

    void lock() {
        while (__atomic_test_and_set(&is_locked_, __ATOMIC_ACQUIRE)) {
        }
    }
    void unlock() { __atomic_clear(&is_locked_, __ATOMIC_RELEASE); }

    Part* first_[kUsual + 1] = {};  // of each size
    size_t bytes_ = 0;
    bool is_locked_ = false;
};

// One for all libraries of a process, so that they keep no more together; Python tells them where it is.
inline Spare own_spare;
inline Spare* spare = &own_spare;

// Memory that one thread takes piece by piece. It fills a cache line, which it shares with no other thread.
class alignas(64) Block {
  public:
    Block() = default;
    Block(const Block&) = delete;
    ~Block() {
        for (const Part& part : parts_)
            if (part.memory) spare->give(part.memory, part.size);
    }

    void* add(size_t bytes) {
        bytes = (bytes + sizeof(double) - 1) / sizeof(double) * sizeof(double);
        if (left_ < bytes) {
            int size = parts_.size() < Spare::kUsual ? int(parts_.size()) : Spare::kUsual;  // small batches stay small
            while (Spare::bytes_of(size) < bytes) ++size;
            Part& part = parts_.add();
            part.size = size;
            next_ = part.memory = spare->take(size);
            left_ = Spare::bytes_of(size);
        }
        left_ -= bytes;
        char* const found = next_;
        next_ += bytes;
        return found;
    }

  private:
    struct Part {
        char* memory;
        int size;
    };

    Array<Part> parts_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

enum class Keep : int { nothing, steps, states, checkpoints };

// A sample between two steps: all that its further steps depend on.
struct Checkpoint {
    double t, h, ratios[3];
    int n_ratios;
    bool starts_at_jump;
    int64_t n_steps, n_accepted, next_output, next_stop;
    void* state;
};

// Checkpoints of a sample, a `stride` of steps from one to the next. Where they become too many, every other one goes,
// and its memory to a later one.
class Checkpoints {
  public:
    size_t count() const { return count_; }
    const Checkpoint& operator[](size_t i) const { return all_[i]; }

    // Tells whether the sample is to be kept after so many accepted steps, and makes room for it.
    bool takes(int64_t n_accepted, size_t most) {
        if (n_accepted % stride_ != 0) return false;
        if (count_ == most) thin();
        return count_ < most && n_accepted % stride_ == 0;
    }

    void add(const Checkpoint& checkpoint, const void* state, size_t bytes, Block& memory) {
        if (count_ == all_.size()) all_.add().state = memory.add(bytes);
        void* const own = all_[count_].state;
        std::memcpy(own, state, bytes);
        all_[count_] = checkpoint;
        all_[count_++].state = own;
    }

  private:
    void thin() {
        for (size_t i = 1; 2 * i < count_; ++i) {
            const Checkpoint thinned = all_[i];
            all_[i] = all_[2 * i];
            all_[2 * i] = thinned;
        }
        count_ = (count_ + 1) / 2;
        stride_ *= 2;
    }

    Array<Checkpoint> all_;  // those beyond the count have memory for a state and nothing else
    size_t count_ = 0;
    int64_t stride_ = 1;
};

struct Round;

// The accepted steps of some chunks of samples, which are independent of one another, or checkpoints among them.
struct Record {
    using Round = aca::Round;
    using Memory = Block;
    static constexpr bool has_checkpoints = true;

    Record(int64_t first_sample, int64_t samples, int64_t first_chunk, int64_t chunks, Keep what, size_t most = 0)
        : keep(what),
          most_checkpoints(most),
          first_sample_(first_sample),
          first_chunk_(first_chunk),
          entries_(keeps_entries() ? size_t(chunks) : 0),
          states_(what == Keep::states || what == Keep::checkpoints ? size_t(chunks) : 0),
          last_(keeps_entries() ? size_t(samples) : 0),
          checkpoints_(what == Keep::checkpoints ? size_t(samples) : 0) {}

    bool keeps_entries() const { return keep == Keep::steps || keep == Keep::states; }
    Block& entries(int64_t chunk) { return entries_[size_t(chunk - first_chunk_)]; }
    Block& states(int64_t chunk) { return states_[size_t(chunk - first_chunk_)]; }
    const Entry*& last(int64_t sample) { return last_[size_t(sample - first_sample_)]; }
    const Entry* last(int64_t sample) const { return last_[size_t(sample - first_sample_)]; }
    Checkpoints& checkpoints(int64_t sample) { return checkpoints_[size_t(sample - first_sample_)]; }
    const Checkpoints& checkpoints(int64_t sample) const { return checkpoints_[size_t(sample - first_sample_)]; }

    void free_states() {
        states_.clear();
        checkpoints_.clear();
    }

    Keep keep;
    size_t most_checkpoints;  // of a sample

  private:
    int64_t first_sample_, first_chunk_;
    Array<Block> entries_, states_;   // of each chunk
    Array<const Entry*> last_;        // of each sample
    Array<Checkpoints> checkpoints_;  // likewise
};

// One round of a backward pass from checkpoints: the steps of each sample from one of its checkpoints to the next, or
// to its end. The first round is number 0, of the last checkpoints. Without a record of them, one round has all steps.
struct Round {
    static constexpr bool is_resumed = true;  // from checkpoints

    const Record* saved = nullptr;
    size_t number = 0;

    bool has(int64_t sample) const { return number < (saved ? saved->checkpoints(sample).count() : 1); }
    bool is_last(int64_t sample) const { return !saved || number + 1 >= saved->checkpoints(sample).count(); }
    const Checkpoint& start(int64_t sample) const {
        const Checkpoints& all = saved->checkpoints(sample);
        return all[all.count() - 1 - number];
    }
    // Number of accepted steps at which the round ends, -1 at the end of the solve.
    int64_t end(int64_t sample) const {
        const Checkpoints& all = saved->checkpoints(sample);
        return number == 0 ? -1 : all[all.count() - number].n_accepted;
    }
};

}  // namespace aca
