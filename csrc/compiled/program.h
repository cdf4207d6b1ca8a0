// A program made by torch's compiler, and the memory that it works on.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace aca {

// Hands out aligned parts of one block of memory. With start 0, `end()` is the size that the block needs.
class Memory {
  public:
    explicit Memory(uintptr_t start) : next_(start) {}

    uintptr_t take(size_t bytes) { return std::exchange(next_, next_ + (bytes + 63) / 64 * 64); }
    uintptr_t end() const { return next_; }

  private:
    uintptr_t next_;
};

// A compiled traced function, which keeps no state. function(inputs, workspace, prepared) reads and writes its inputs,
// with intermediate results in the workspace. prepare(inputs, prepared) computes the values that depend on func's
// inputs alone, once per solve. The first inputs are
//   slope      scalars, y, k
//   step       scalars, y, k_1, y1, sums, k_2 ... k_s
//   transpose  scalars, y, g, g_y, and for outputs inside the step g_inside, G_1 ... G_s
// where scalars are the stage times, h, rtol and atol. Further inputs are constant during a solve.
struct Code {
    uintptr_t function, prepare;
    size_t workspace_bytes, prepared_bytes;
};

// A compiled traced function with its inputs.
struct Program {
    Code code{};
    uintptr_t workspace = 0, prepared = 0;
    std::vector<uintptr_t> inputs;

    void prepare() const {
        reinterpret_cast<void (*)(const uintptr_t*, uintptr_t)>(code.prepare)(inputs.data(), prepared);
    }
    void run() const {
        reinterpret_cast<void (*)(const uintptr_t*, uintptr_t, uintptr_t)>(code.function)(inputs.data(), workspace,
                                                                                          prepared);
    }
};

}  // namespace aca
