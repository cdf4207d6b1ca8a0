// Decisions about a control block in the host's memory. A file of its own, because multiplications and additions are
// not to be fused here, and the code is to run on any processor.
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
