// Lanes as vectors of the compiler, which are SIMD registers.
#pragma once
#include <cstdint>
#include <cstring>

#include "control/controller.h"

#ifdef __AVX512F__
#define ACA_VECTOR_BYTES 64
#elif defined(__AVX__)
#define ACA_VECTOR_BYTES 32
#else
#define ACA_VECTOR_BYTES 16
#endif

namespace aca {

constexpr int kLanes = ACA_VECTOR_BYTES / int(sizeof(T));

typedef double Doubles __attribute__((vector_size(ACA_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(ACA_VECTOR_BYTES)));

// Lanes come in parts of kWidth, whose doubles fill one register; with numbers of 64 bits and truths about them.
constexpr int kWidth = ACA_VECTOR_BYTES / int(sizeof(double));
typedef uint64_t Words __attribute__((vector_size(ACA_VECTOR_BYTES)));
typedef int64_t Counts __attribute__((vector_size(ACA_VECTOR_BYTES)));
typedef Counts Truths;

template <typename>
struct Types;
template <>
struct Types<double> {
    typedef Doubles Numbers;
    typedef int64_t Truth;
};
template <>
struct Types<float> {
    typedef Floats Numbers;
    typedef int32_t Truth;
};

typedef Types<T>::Numbers V;
typedef Types<T>::Truth Truth;
typedef Truth M __attribute__((vector_size(kLanes * sizeof(T))));
typedef double R __attribute__((vector_size(kLanes * sizeof(double))));

inline V K(double x) { return T(x) - V{}; }  // + would be an addition, for -0 + 0 is not -0
inline V select(M m, V a, V b) { return m ? a : b; }
inline M bits_of(V a) { return M(a); }
inline V of_bits(M a) { return V(a); }

// Numbers rounded to another type.
template <typename To, typename From>
inline To rounded(From a) {
    return __builtin_convertvector(a, To);
}

inline Doubles to_single(Doubles x) {
    typedef float Singles __attribute__((vector_size(ACA_VECTOR_BYTES / 2)));
    return __builtin_convertvector(__builtin_convertvector(x, Singles), Doubles);
}

// One bit for each truth, the first one lowest.
inline unsigned bits_of_truths(Truths truths) {
#if defined(__AVX512F__) && !defined(__clang__)
    typedef long long Quads __attribute__((vector_size(ACA_VECTOR_BYTES)));
    return __builtin_ia32_ptestmq512(Quads(truths), Quads(truths), -1);
#elif defined(__AVX__) && !defined(__clang__)
    return unsigned(__builtin_ia32_movmskpd256(Doubles(truths)));
#else
    unsigned bits = 0;
    for (int l = 0; l < kWidth; ++l) bits |= unsigned(truths[l] & 1) << l;
    return bits;
#endif
}

// Truths about the lanes of a part, among those about all lanes.
inline void set_truths(M& all, int part, Truths truths) {
    typedef Truth Some __attribute__((vector_size(kWidth * sizeof(Truth))));
    const Some some = __builtin_convertvector(truths, Some);
    std::memcpy(reinterpret_cast<char*>(&all) + part * sizeof some, &some, sizeof some);
}

// Calls f with the number of every lane whose bit is set.
template <typename F>
inline void each_lane(unsigned bits, F f) {
    for (; bits; bits &= bits - 1) f(__builtin_ctz(bits));
}

// By builtins, which take a tenth of the time that it takes to compile the header with their names.
#if defined(__clang__)
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return __builtin_elementwise_fma(a, b, c); }
inline Doubles root(Doubles a) { return __builtin_elementwise_sqrt(a); }
inline V fma(V a, V b, V c) { return __builtin_elementwise_fma(a, b, c); }
inline V sqrt(V a) { return __builtin_elementwise_sqrt(a); }
#elif defined(__AVX512F__)
constexpr int kCurrentRounding = 4;
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
    return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, kCurrentRounding);
}
inline Floats fused(Floats a, Floats b, Floats c) {
    return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, kCurrentRounding);
}
inline Doubles root(Doubles a) { return __builtin_ia32_sqrtpd512_mask(a, a, -1, kCurrentRounding); }
inline Floats root(Floats a) { return __builtin_ia32_sqrtps512_mask(a, a, -1, kCurrentRounding); }
#elif defined(__FMA__)
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return __builtin_ia32_vfmaddpd256(a, b, c); }
inline Floats fused(Floats a, Floats b, Floats c) { return __builtin_ia32_vfmaddps256(a, b, c); }
inline Doubles root(Doubles a) { return __builtin_ia32_sqrtpd256(a); }
inline Floats root(Floats a) { return __builtin_ia32_sqrtps256(a); }
#endif

#if defined(__FMA__) && !defined(__clang__)
inline V fma(V a, V b, V c) { return fused(a, b, c); }
inline V sqrt(V a) { return root(a); }
#elif !defined(__clang__)
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline Doubles root(Doubles a) {
    for (int l = 0; l < kWidth; ++l) a[l] = math::sqrt(a[l]);
    return a;
}
inline V fma(V a, V b, V c) {
    V r;
    for (int l = 0; l < kLanes; ++l) r[l] = math::fma(a[l], b[l], c[l]);
    return r;
}
inline V sqrt(V a) {
    for (int l = 0; l < kLanes; ++l) a[l] = math::sqrt(a[l]);
    return a;
}
#endif

// Functions of PyTorch's vector code (SLEEF) where its library has them, else those of C++. Addresses of the former are
// set when the code is loaded: linking with the library would take longer than all else.
#if defined(ACA_SLEEF) && defined(__FMA__)
#define ACA_ADDRESS(name)                                              \
    extern "C" {                                                       \
    __attribute__((visibility("default"), weak)) void* address_##name; \
    }
#define ACA_FUNCTION(name, digits) \
    ACA_ADDRESS(name)              \
    inline V name(V a) { return reinterpret_cast<V (*)(V)>(address_##name)(a); }
#define ACA_FUNCTION2(name, called, digits) \
    ACA_ADDRESS(name)                       \
    inline V name(V a, V b) { return reinterpret_cast<V (*)(V, V)>(address_##name)(a, b); }
#endif

}  // namespace aca
