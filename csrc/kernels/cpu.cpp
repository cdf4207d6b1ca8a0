// Chooses the CPU kernels for the best instruction set that this processor and operating system support.
#include "kernels/ops.h"

namespace aca {

namespace portable {
extern const Backend backend;
}
#ifdef ACA_X86
namespace avx2 {
extern const Backend backend;
}
namespace avx512 {
extern const Backend backend;
}
#endif

namespace {

struct Choice {
    const Backend& backend;
    const char* name;
};

Choice choose() {
#ifdef ACA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return {avx512::backend, "avx512"};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {avx2::backend, "avx2"};
#endif
    return {portable::backend, "portable"};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

const Backend& cpu_backend() { return choice().backend; }

const char* cpu_instruction_set() { return choice().name; }

}  // namespace aca
