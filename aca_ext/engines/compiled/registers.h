// Vectors of the size of a register, for compiled programs: compilers take larger ones apart in memory.
#pragma once

namespace aca {

#if defined(__AVX512F__)
constexpr long kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr long kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr long kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr long kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <typename T, long COUNT>
struct VectorOf {
    typedef T Type __attribute__((vector_size(COUNT * sizeof(T))));
};

// The sum of a vector's elements, in a fixed order: its halves are added until one element is left.
template <typename T, long COUNT>
inline T sum_of(const typename VectorOf<T, COUNT>::Type& v) {
    if constexpr (COUNT == 1) {
        return v[0];
    } else {
        typename VectorOf<T, COUNT / 2>::Type low, high;
        __builtin_memcpy(&low, &v, sizeof low);
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum_of<T, COUNT / 2>(low + high);
    }
}

}  // namespace aca
