// Checksum of memory, to detect that its contents changed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace aca {

// Computed in eight independent lanes, since a multiplication takes several cycles. Each step is a bijection of its
// lane, so that a single changed word always changes the sum.
inline uint64_t checksum(uintptr_t address, size_t bytes) {
    constexpr size_t kLanes = 8;
    constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;
    uint64_t lane[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
    const char* from = reinterpret_cast<const char*>(address);
    for (uint64_t words[kLanes]; bytes; from += sizeof words) {
        const size_t n = bytes < sizeof words ? bytes : sizeof words;
        if (n < sizeof words) std::memset(words, 0, sizeof words);
        std::memcpy(words, from, n);
        for (size_t i = 0; i < kLanes; ++i) {
            lane[i] = (lane[i] ^ words[i]) * kFactor;
            lane[i] ^= lane[i] >> 32;
        }
        bytes -= n;
    }
    uint64_t sum = 0;
    for (const uint64_t value : lane) sum = (sum ^ value) * kFactor + 1;
    return sum;
}

}  // namespace aca
