// Shared by all CUDA code: errors as exceptions, and a guard that makes a device current.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "control/control_block.h"
#include "kernels/types.h"

namespace aca {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which would surface again at the next launch
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
}

// Makes a device current for a scope, then restores the caller's.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (previous_ != device) {
            check(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

void write_control_on_cuda(const Target& target, uintptr_t to, const Control& from);
void decide_on_cuda(const Target& target, uintptr_t control, Decision decision);

}  // namespace aca
