// A loop that a GPU runs by itself: captured graphs repeated while the control block says so, as one launch.
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

}  // namespace aca
