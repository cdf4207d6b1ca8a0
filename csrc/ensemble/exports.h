// What a compiled source exports. Its two parts, ACA_FORWARD and ACA_BACKWARD of library.h or threads.cuh, may be
// compiled at the same time and linked.
#pragma once

// All else is hidden, so that libraries loaded side by side share nothing.
#define ACA_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(ACA_ONLY_FORWARD)
#define ACA_LIBRARY ACA_FORWARD
#elif defined(ACA_ONLY_BACKWARD)
#define ACA_LIBRARY ACA_BACKWARD
#else
#define ACA_LIBRARY(Field, Method) ACA_FORWARD(Field, Method) ACA_BACKWARD(Field, Method)
#endif
