// A single lane: a thread of a GPU, or of the CPU's loop that stands for one in tests.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "control/controller.h"

namespace aca {

constexpr int kLanes = 1;

// A number with the operators of a vector of the compiler. Device code has no such vectors.
template <typename X>
struct One {
    using Truth = One<std::conditional_t<sizeof(X) == 8, int64_t, int32_t>>;
    X x;

    One() = default;
    ACA_HD One(X number) : x(number) {}
    ACA_HD X& operator[](int) { return x; }
    ACA_HD const X& operator[](int) const { return x; }

    ACA_HD friend One operator+(One a, One b) { return X(a.x + b.x); }
    ACA_HD friend One operator-(One a, One b) { return X(a.x - b.x); }
    ACA_HD friend One operator*(One a, One b) { return X(a.x * b.x); }
    ACA_HD friend One operator/(One a, One b) { return X(a.x / b.x); }
    ACA_HD friend One operator&(One a, One b) { return X(a.x & b.x); }
    ACA_HD friend One operator|(One a, One b) { return X(a.x | b.x); }
    ACA_HD friend One operator^(One a, One b) { return X(a.x ^ b.x); }
    ACA_HD friend One operator<<(One a, int count) { return X(a.x << count); }
    ACA_HD One operator-() const { return X(-x); }
    ACA_HD One operator~() const { return X(~x); }
    ACA_HD One& operator+=(One b) { return *this = *this + b; }
    ACA_HD One& operator*=(One b) { return *this = *this * b; }

    ACA_HD friend Truth operator<(One a, One b) { return {a.x < b.x ? -1 : 0}; }
    ACA_HD friend Truth operator<=(One a, One b) { return {a.x <= b.x ? -1 : 0}; }
    ACA_HD friend Truth operator>(One a, One b) { return {a.x > b.x ? -1 : 0}; }
    ACA_HD friend Truth operator>=(One a, One b) { return {a.x >= b.x ? -1 : 0}; }
    ACA_HD friend Truth operator==(One a, One b) { return {a.x == b.x ? -1 : 0}; }
    ACA_HD friend Truth operator!=(One a, One b) { return {a.x != b.x ? -1 : 0}; }
};

typedef One<T> V;
typedef V::Truth M;
typedef One<double> R;
typedef double Doubles;
typedef uint64_t Words;
typedef int64_t Counts;
typedef bool Truths;
constexpr int kWidth = 1;
typedef decltype(M::x) Truth;

ACA_HD V K(double x) { return T(x); }
ACA_HD V select(M m, V a, V b) { return m.x ? a : b; }

ACA_HD M bits_of(V a) {
    M bits;
    std::memcpy(&bits.x, &a.x, sizeof a.x);
    return bits;
}
ACA_HD V of_bits(M a) {
    V number;
    std::memcpy(&number.x, &a.x, sizeof a.x);
    return number;
}

// A number rounded to another type.
template <typename To, typename From>
ACA_HD To rounded(From a) {
    return decltype(To::x)(a.x);
}

ACA_HD unsigned bits_of_truths(Truths truth) { return truth; }
ACA_HD void set_truths(M& all, int, Truths truth) { all.x = truth ? -1 : 0; }
template <typename F>
ACA_HD void each_lane(unsigned bits, F f) {
    if (bits) f(0);
}

ACA_HD double root(double x) { return math::sqrt(x); }
ACA_HD double fused(double a, double b, double c) { return math::fma(a, b, c); }
ACA_HD V fma(V a, V b, V c) { return math::fma(a.x, b.x, c.x); }
ACA_HD V sqrt(V a) { return math::sqrt(a.x); }

}  // namespace aca
