// Captured graphs: what repeats them on the GPU while the control block says so, as one launch, and what saves a
// capture that failed.
#pragma once
#include <cstdint>
#include <string>

namespace aca {

// Needs conditional nodes: CUDA 12.4 when this was built, and in the driver.
class LoopGraph {
  public:
    // One launch runs `first` (0: nothing), and then `body` until the control block at `control` is not unfinished.
    // Both are captured graphs (cudaGraph_t), which are copied.
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

// Why a captured graph cannot be repeated on the device, "" where it can.
std::string obstacle_to_loop(uintptr_t graph);

// Drops what was captured on the stream so far, an invalid capture too, and captures anew: torch can then end the
// capture that it began, and with it what it set up. Left alone it fails to, and so does every later capture.
void restart_capture(int device, uintptr_t stream);

}  // namespace aca
