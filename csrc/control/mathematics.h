// Functions of the mathematical library. Generated code is compiled while a program waits, and <cmath> would take a
// seventh of that time; compilers know these functions without it.
#pragma once
#ifdef __CUDACC__
#include <cmath>
#endif

namespace aca {

constexpr double kInfinity = __builtin_huge_val(), kNaN = __builtin_nan("");

#ifdef __CUDACC__
namespace math = std;
#else
namespace math {

#define ACA_OF_ONE(name)                                         \
    inline double name(double x) { return __builtin_##name(x); } \
    inline float name(float x) { return __builtin_##name##f(x); }
#define ACA_OF_TWO(name)                                                      \
    inline double name(double x, double y) { return __builtin_##name(x, y); } \
    inline float name(float x, float y) { return __builtin_##name##f(x, y); }

ACA_OF_ONE(exp)
ACA_OF_ONE(exp2)
ACA_OF_ONE(expm1)
ACA_OF_ONE(log)
ACA_OF_ONE(log2)
ACA_OF_ONE(log10)
ACA_OF_ONE(log1p)
ACA_OF_ONE(sin)
ACA_OF_ONE(cos)
ACA_OF_ONE(tan)
ACA_OF_ONE(asin)
ACA_OF_ONE(acos)
ACA_OF_ONE(atan)
ACA_OF_ONE(sinh)
ACA_OF_ONE(cosh)
ACA_OF_ONE(asinh)
ACA_OF_ONE(acosh)
ACA_OF_ONE(atanh)
ACA_OF_ONE(erf)
ACA_OF_ONE(erfc)
ACA_OF_ONE(sqrt)
ACA_OF_ONE(floor)
ACA_OF_ONE(ceil)
ACA_OF_ONE(trunc)
ACA_OF_ONE(nearbyint)
ACA_OF_TWO(pow)
ACA_OF_TWO(atan2)
ACA_OF_TWO(hypot)
ACA_OF_TWO(fmod)
ACA_OF_TWO(copysign)
ACA_OF_TWO(nextafter)
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

#undef ACA_OF_ONE
#undef ACA_OF_TWO

}  // namespace math
#endif

}  // namespace aca
