// Decisions about a control block in host memory. A file of its own, because it is compiled for any processor and
// without fused multiply-add.
#include "control/control_block.h"

namespace aca {

void write_control_on_cpu(uintptr_t to, const Control& from) { *control::at<Control>(to) = from; }

void decide_on_cpu(uintptr_t address, Decision decision) {
    Control& s = *control::at<Control>(address);
    control::decide(s, decision);
    for (int64_t output = s.solve.first_due; s.solve.is_accepted && s.degree && output < s.solve.end_due; ++output)
        control::write_weights(s, output);
}

}  // namespace aca
