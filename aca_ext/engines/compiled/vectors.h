// Vectors of floats and doubles for compiled programs: the part of torch's at::vec that most kernels of Inductor need,
// with the same results, for AVX2 and AVX-512. In vectors and builtins of GCC: reading torch's headers, or the one that
// names the instructions, takes longer than compiling a program.
#pragma once
#include <cstdint>

#ifdef __clang__
#error "clang has other builtins"
#endif

#define C10_LIKELY(condition) (__builtin_expect(static_cast<bool>(condition), 1))
#define C10_UNLIKELY(condition) (__builtin_expect(static_cast<bool>(condition), 0))

// F is called with each function of Sleef, and its precision for floats and for doubles; libtorch_cpu exports them.
// clang-format off
#define ACA_UNARY_FUNCTIONS(F)                                                                                   \
    F(exp, _u10, _u10) F(expm1, _u10, _u10) F(log, _u10, _u10) F(log1p, _u10, _u10) F(log2, _u10, _u10)          \
    F(log10, _u10, _u10) F(sin, _u35, _u10) F(cos, _u35, _u10) F(tan, _u10, _u10) F(asin, _u10, _u10)            \
    F(acos, _u10, _u10) F(atan, _u10, _u10) F(asinh, _u10, _u10) F(atanh, _u10, _u10) F(tanh, _u10, _u10)
// clang-format on
#define ACA_BINARY_FUNCTIONS(F) F(pow, _u10, _u10) F(atan2, _u10, _u10)

namespace at::vec {

#ifdef CPU_CAPABILITY_AVX512
constexpr int kBytes = 64;
#define ACA_NUMBERS_OF_FLOATS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define ACA_NUMBERS_OF_DOUBLES {0, 1, 2, 3, 4, 5, 6, 7}
#define ACA_FLOATS(function, precision) Sleef_##function##f16##precision
#define ACA_DOUBLES(function, precision) Sleef_##function##d8##precision
#else
constexpr int kBytes = 32;
#define ACA_NUMBERS_OF_FLOATS {0, 1, 2, 3, 4, 5, 6, 7}
#define ACA_NUMBERS_OF_DOUBLES {0, 1, 2, 3}
#define ACA_FLOATS(function, precision) Sleef_##function##f8##precision
#define ACA_DOUBLES(function, precision) Sleef_##function##d4##precision
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef float HalfOfFloats __attribute__((vector_size(kBytes / 2)));

// Bits are integers of which all bits are set, or none, as comparisons return them.
template <typename T>
struct Registers;
template <>
struct Registers<float> {
    using Values = Floats;
    typedef int Bits __attribute__((vector_size(kBytes)));
    static constexpr int sign = 1 << 31;
    static Bits numbers() { return Bits ACA_NUMBERS_OF_FLOATS; }
};
template <>
struct Registers<double> {
    using Values = Doubles;
    typedef long long Bits __attribute__((vector_size(kBytes)));
    static constexpr long long sign = 1LL << 63;
    static Bits numbers() { return Bits ACA_NUMBERS_OF_DOUBLES; }
};

// True for the first elements.
template <typename T>
typename Registers<T>::Bits first(int64_t count) {
    return Registers<T>::numbers() < static_cast<decltype(Registers<T>::sign)>(count);
}

#define ACA_UNARY(function, of_floats, of_doubles)                                       \
    extern "C" Floats ACA_FLOATS(function, of_floats)(Floats);                           \
    extern "C" Doubles ACA_DOUBLES(function, of_doubles)(Doubles);                       \
    inline Floats function##_of(Floats x) { return ACA_FLOATS(function, of_floats)(x); } \
    inline Doubles function##_of(Doubles x) { return ACA_DOUBLES(function, of_doubles)(x); }
#define ACA_BINARY(function, of_floats, of_doubles)                                                   \
    extern "C" Floats ACA_FLOATS(function, of_floats)(Floats, Floats);                                \
    extern "C" Doubles ACA_DOUBLES(function, of_doubles)(Doubles, Doubles);                           \
    inline Floats function##_of(Floats x, Floats y) { return ACA_FLOATS(function, of_floats)(x, y); } \
    inline Doubles function##_of(Doubles x, Doubles y) { return ACA_DOUBLES(function, of_doubles)(x, y); }
ACA_UNARY_FUNCTIONS(ACA_UNARY)
ACA_BINARY_FUNCTIONS(ACA_BINARY)
#undef ACA_UNARY
#undef ACA_BINARY

// Square roots, roundings down (1) and up (2), and loads and stores of the first elements.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kCurrentRounding = 4;
inline unsigned first_bits(int64_t count) { return (1U << count) - 1; }
inline Floats load(const float* from, int64_t count) {
    return __builtin_ia32_loadups512_mask(from, Floats{}, first_bits(count));
}
inline Doubles load(const double* from, int64_t count) {
    return __builtin_ia32_loadupd512_mask(from, Doubles{}, first_bits(count));
}
inline void store(float* to, Floats x, int64_t count) { __builtin_ia32_storeups512_mask(to, x, first_bits(count)); }
inline void store(double* to, Doubles x, int64_t count) { __builtin_ia32_storeupd512_mask(to, x, first_bits(count)); }
inline Floats sqrt_of(Floats x) { return __builtin_ia32_sqrtps512_mask(x, x, -1, kCurrentRounding); }
inline Doubles sqrt_of(Doubles x) { return __builtin_ia32_sqrtpd512_mask(x, x, -1, kCurrentRounding); }
inline Floats floor_of(Floats x) { return __builtin_ia32_rndscaleps_mask(x, 1, x, -1, kCurrentRounding); }
inline Doubles floor_of(Doubles x) { return __builtin_ia32_rndscalepd_mask(x, 1, x, -1, kCurrentRounding); }
inline Floats ceil_of(Floats x) { return __builtin_ia32_rndscaleps_mask(x, 2, x, -1, kCurrentRounding); }
inline Doubles ceil_of(Doubles x) { return __builtin_ia32_rndscalepd_mask(x, 2, x, -1, kCurrentRounding); }
#else
inline Floats load(const float* from, int64_t count) {
    return __builtin_ia32_maskloadps256(reinterpret_cast<const Floats*>(from), first<float>(count));
}
inline Doubles load(const double* from, int64_t count) {
    return __builtin_ia32_maskloadpd256(reinterpret_cast<const Doubles*>(from), first<double>(count));
}
inline void store(float* to, Floats x, int64_t count) {
    __builtin_ia32_maskstoreps256(reinterpret_cast<Floats*>(to), first<float>(count), x);
}
inline void store(double* to, Doubles x, int64_t count) {
    __builtin_ia32_maskstorepd256(reinterpret_cast<Doubles*>(to), first<double>(count), x);
}
inline Floats sqrt_of(Floats x) { return __builtin_ia32_sqrtps256(x); }
inline Doubles sqrt_of(Doubles x) { return __builtin_ia32_sqrtpd256(x); }
inline Floats floor_of(Floats x) { return __builtin_ia32_roundps256(x, 1); }
inline Doubles floor_of(Doubles x) { return __builtin_ia32_roundpd256(x, 1); }
inline Floats ceil_of(Floats x) { return __builtin_ia32_roundps256(x, 2); }
inline Doubles ceil_of(Doubles x) { return __builtin_ia32_roundpd256(x, 2); }
#endif

// The result of a comparison, of N registers.
template <typename T, int N>
struct VecMask {
    typename Registers<T>::Bits bits[N];

    template <typename U, int M>
    VecMask<U, M> cast() const {
        static_assert(sizeof(U) == sizeof(T) && M == N);
        return *this;
    }
    template <typename F>
    static VecMask of_each(F f) {
        VecMask mask;
        for (int i = 0; i < N; ++i) mask.bits[i] = f(i);
        return mask;
    }
    VecMask operator&(VecMask b) const {
        return of_each([&](int i) { return bits[i] & b.bits[i]; });
    }
    VecMask operator|(VecMask b) const {
        return of_each([&](int i) { return bits[i] | b.bits[i]; });
    }
    VecMask operator^(VecMask b) const {
        return of_each([&](int i) { return bits[i] ^ b.bits[i]; });
    }
    VecMask operator~() const {
        return of_each([&](int i) { return ~bits[i]; });
    }
};

template <typename T>
struct Vectorized {
    using value_type = T;
    using Values = typename Registers<T>::Values;
    using Bits = typename Registers<T>::Bits;
    using Mask = VecMask<T, 1>;
    static constexpr auto sign = Registers<T>::sign;
    Values values;

    static constexpr int size() { return kBytes / sizeof(T); }
    Vectorized() : values{} {}
    Vectorized(Values v) : values(v) {}
    Vectorized(T x) : values(x - Values{}) {}
    static Vectorized loadu(const void* from, int64_t count = size()) {
        if (count < size()) return load(static_cast<const T*>(from), count);
        Values values;
        __builtin_memcpy(&values, from, sizeof values);
        return values;
    }
    void store(void* to, int64_t count = size()) const {
        if (count == size())
            __builtin_memcpy(to, &values, sizeof values);
        else if (count > 0)
            vec::store(static_cast<T*>(to), values, count);
    }
    static Vectorized blendv(Vectorized a, Vectorized b, Mask mask) { return mask.bits[0] ? b.values : a.values; }
    // The first elements of b, and the others of a.
    static Vectorized set(Vectorized a, Vectorized b, int64_t count = size()) {
        return count == size() ? b : blendv(a, b, Mask{{first<T>(count)}});
    }
    Vectorized abs() const { return (Values)((Bits)values & ~sign); }
    Vectorized neg() const { return (Values)((Bits)values ^ sign); }
    Vectorized copysign(Vectorized b) const { return (Values)(((Bits)values & ~sign) | ((Bits)b.values & sign)); }
    Vectorized sqrt() const { return sqrt_of(values); }
    Vectorized floor() const { return floor_of(values); }
    Vectorized ceil() const { return ceil_of(values); }
    Vectorized reciprocal() const { return T(1) / values; }
    Vectorized rsqrt() const { return T(1) / sqrt_of(values); }
#define ACA_UNARY(function, ...) \
    Vectorized function() const { return function##_of(values); }
#define ACA_BINARY(function, ...) \
    Vectorized function(Vectorized b) const { return function##_of(values, b.values); }
    ACA_UNARY_FUNCTIONS(ACA_UNARY)
    ACA_BINARY_FUNCTIONS(ACA_BINARY)
#undef ACA_UNARY
#undef ACA_BINARY
    friend Vectorized operator+(Vectorized a, Vectorized b) { return a.values + b.values; }
    friend Vectorized operator-(Vectorized a, Vectorized b) { return a.values - b.values; }
    friend Vectorized operator*(Vectorized a, Vectorized b) { return a.values * b.values; }
    friend Vectorized operator/(Vectorized a, Vectorized b) { return a.values / b.values; }
    Mask operator==(Vectorized b) const { return {{(Bits)(values == b.values)}}; }
    Mask operator!=(Vectorized b) const { return {{(Bits)(values != b.values)}}; }
    Mask operator<(Vectorized b) const { return {{(Bits)(values < b.values)}}; }
    Mask operator<=(Vectorized b) const { return {{(Bits)(values <= b.values)}}; }
    Mask operator>(Vectorized b) const { return {{(Bits)(values > b.values)}}; }
    Mask operator>=(Vectorized b) const { return {{(Bits)(values >= b.values)}}; }
    Mask is_nan_with(Vectorized b) const { return {{(Bits)((values != values) | (b.values != b.values))}}; }
    // b where an operand is NaN, or where both are zeros.
    Vectorized larger(Vectorized b) const { return values > b.values ? values : b.values; }
    Vectorized smaller(Vectorized b) const { return values < b.values ? values : b.values; }
};

// Two vectors of doubles, of as many elements as a vector of floats.
template <typename T, int N>
struct VectorizedN {
    static_assert(N == 2 && sizeof(T) == 8);
    using value_type = T;
    using Half = Vectorized<T>;
    using Mask = VecMask<T, N>;
    Half low, high;

    VectorizedN() {}
    VectorizedN(T x) : low(x), high(x) {}
    VectorizedN(Half low, Half high) : low(low), high(high) {}
    static constexpr int size() { return 2 * Half::size(); }
    static int64_t in_low(int64_t count) { return count < Half::size() ? count : Half::size(); }
    static int64_t in_high(int64_t count) { return count < Half::size() ? 0 : count - Half::size(); }
    static VectorizedN loadu(const T* from, int64_t count = size()) {
        return {Half::loadu(from, in_low(count)), Half::loadu(from + Half::size(), in_high(count))};
    }
    void store(T* to, int64_t count = size()) const {
        low.store(to, in_low(count));
        high.store(to + Half::size(), in_high(count));
    }
    static VectorizedN blendv(VectorizedN a, VectorizedN b, Mask mask) {
        return {Half::blendv(a.low, b.low, {{mask.bits[0]}}), Half::blendv(a.high, b.high, {{mask.bits[1]}})};
    }
    static VectorizedN set(VectorizedN a, VectorizedN b, int64_t count) {
        return {Half::set(a.low, b.low, in_low(count)), Half::set(a.high, b.high, in_high(count))};
    }
#define ACA_UNARY(function, ...) \
    VectorizedN function() const { return {low.function(), high.function()}; }
#define ACA_BINARY(function, ...) \
    VectorizedN function(VectorizedN b) const { return {low.function(b.low), high.function(b.high)}; }
#define ACA_OPERATOR(sign) \
    friend VectorizedN operator sign(VectorizedN a, VectorizedN b) { return {a.low sign b.low, a.high sign b.high}; }
#define ACA_COMPARISON(function) \
    Mask function(VectorizedN b) const { return {{low.function(b.low).bits[0], high.function(b.high).bits[0]}}; }
    ACA_UNARY_FUNCTIONS(ACA_UNARY)
    ACA_BINARY_FUNCTIONS(ACA_BINARY)
    ACA_UNARY(abs)
    ACA_UNARY(neg)
    ACA_UNARY(sqrt)
    ACA_UNARY(floor)
    ACA_UNARY(ceil)
    ACA_UNARY(reciprocal)
    ACA_UNARY(rsqrt)
    ACA_BINARY(copysign)
    ACA_BINARY(larger)
    ACA_BINARY(smaller)
    ACA_OPERATOR(+)
    ACA_OPERATOR(-)
    ACA_OPERATOR(*)
    ACA_OPERATOR(/)
    ACA_COMPARISON(operator==)
    ACA_COMPARISON(operator!=)
    ACA_COMPARISON(operator<)
    ACA_COMPARISON(operator<=)
    ACA_COMPARISON(operator>)
    ACA_COMPARISON(operator>=)
    ACA_COMPARISON(is_nan_with)
#undef ACA_UNARY
#undef ACA_BINARY
#undef ACA_OPERATOR
#undef ACA_COMPARISON
};

// NaN if an operand is NaN.
template <typename V>
V or_nan(V a, V b, V x) {
    return V::blendv(x, V(static_cast<typename V::value_type>(__builtin_nan(""))), a.is_nan_with(b));
}
template <typename V>
V maximum(V a, V b) {
    return or_nan(a, b, a.larger(b));
}
template <typename V>
V minimum(V a, V b) {
    return or_nan(a, b, a.smaller(b));
}
template <typename V>
V clamp_min(V a, V least) {
    return least.larger(a);
}
template <typename V>
V clamp_max(V a, V most) {
    return most.smaller(a);
}

template <typename T, int N, typename U, int M>
VectorizedN<T, N> convert(Vectorized<U> x) {
    static_assert(N == 2 && M == 1 && sizeof(T) == 2 * sizeof(U));
    HalfOfFloats halves[2];
    __builtin_memcpy(halves, &x.values, sizeof x.values);
    return {__builtin_convertvector(halves[0], Doubles), __builtin_convertvector(halves[1], Doubles)};
}

inline double reduced(Vectorized<double> x, Vectorized<double> (*combine)(Vectorized<double>&, Vectorized<double>&)) {
    const Doubles each = x.values;
    for (int i = 1; i < x.size(); ++i) {
        Vectorized<double> next(each[i]);
        x = combine(x, next);
    }
    return x.values[0];
}
inline float reduced(Vectorized<float> x, Vectorized<float> (*combine)(Vectorized<float>&, Vectorized<float>&)) {
    const auto numbers = Registers<float>::numbers();
    for (int half = x.size() / 2; half > 0; half /= 2) {
        Vectorized<float> other = __builtin_shuffle(x.values, numbers ^ half);
        x = combine(x, other);
    }
    return x.values[0];
}

// The elements of a vector combined in torch's order.
template <typename T, int N, typename Combine>
T vec_reduce_all(const Combine& combine, Vectorized<T> x) {
    return reduced(x, combine);
}
template <typename T, int N, typename Combine>
T vec_reduce_all(const Combine& combine, VectorizedN<T, N> x) {
    return reduced(combine(x.low, x.high), combine);
}

}  // namespace at::vec

template <typename V>
V sum_masked_reduce(V a, V b, int64_t count) {
    return V::set(a, a + b, count);
}
