// CUDA graph that repeats captured steps on the GPU in one launch, and the recovery from a failed capture.
#pragma once
#include <cstdint>
#include <string>

namespace aca {

// Needs conditional nodes: CUDA 12.4 or newer, at build time and in the driver.
class LoopGraph {
  public:
    // A launch runs `first` (0: none), then repeats `body` until is_unfinished is 0 in the control block at `control`.
    // Both are captured CUDA graphs (cudaGraph_t), and are copied.
    LoopGraph(int device, uintptr_t first, uintptr_t body, uintptr_t control);
    ~LoopGraph();
    LoopGraph(const LoopGraph&) = delete;
    LoopGraph& operator=(const LoopGraph&) = delete;

    void launch(uintptr_t stream) const;

    static bool is_supported();

  private:
    void *graph_ = nullptr, *executable_ = nullptr;
    int device_;
};

// Returns the reason why a captured CUDA graph cannot be repeated on the device, or "" if it can.
std::string obstacle_to_loop(uintptr_t graph);

// Discards the capture on the stream, valid or not, and begins a new one, so that torch can end the capture that it
// began. Otherwise torch fails to end it, and every later capture fails too.
void restart_capture(int device, uintptr_t stream);

// Returns a new stream that does not wait for the default stream, and that no one else gets. It is never destroyed.
uintptr_t new_stream(int device);

}  // namespace aca
