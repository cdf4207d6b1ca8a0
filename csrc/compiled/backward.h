// Backward pass of the compiled engine: transposes every accepted step, last first, as aca_ext.gradients.aca does.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "compiled/specification.h"

namespace aca {

// Runs one program for steps without outputs inside, and another for steps with them. A program that no step needs may
// have function 0.
class CompiledBackward {
  public:
    CompiledBackward(const Specification& specification, const Code& end_only, const Code& inside)
        : spec_(specification), end_only_{end_only, 0, 0, {}}, inside_{inside, 0, 0, {}} {}

    // Size in bytes of the memory that `run` needs.
    size_t memory_bytes() { return lay_out(0); }

    // `inputs` are the gradients of func's inputs, which this sets to 0 and adds to, of `gradient_bytes` each, and then
    // func's inputs. `grad_outputs` holds one cotangent per requested time.
    // Writes the cotangent of y0 to `grad_y0`.
    void run(const std::vector<AcceptedStep>& steps, uintptr_t memory, const std::vector<uintptr_t>& inputs,
             const std::vector<size_t>& gradient_bytes, uintptr_t grad_outputs, uintptr_t grad_y0) {
        lay_out(memory);
        for (size_t i = 0; i < gradient_bytes.size(); ++i) std::memset(at(inputs[i]), 0, gradient_bytes[i]);
        // Each step reads g and writes g_next. The first is chosen such that the last one writes to grad_y0.
        uintptr_t g = grad_y0, g_next = other_;
        if (steps.size() % 2) std::swap(g, g_next);
        for (Program* program : {&end_only_, &inside_}) {
            program->inputs.insert(program->inputs.end(), inputs.begin(), inputs.end());
            if (program->code.function) program->prepare();
        }
        const size_t bytes = spec_.bytes();
        std::memset(at(g), 0, bytes);
        for (size_t i = steps.size(); i-- > 0;) {
            const AcceptedStep& step = steps[i];
            bool has_inside = false;
            for (const auto& [index, theta] : step.outputs) {
                if (theta == 1.0)
                    spec_.add(g, 1.0, grad_outputs + size_t(index) * bytes);
                else
                    has_inside = true;
            }
            Program& program = has_inside ? inside_ : end_only_;
            if (has_inside) gather(grad_outputs, step);
            spec_.write_scalars(program.inputs[0], step.t, step.h, step.t_next);
            program.inputs[1] = step.y;
            program.inputs[2] = g;
            program.inputs[3] = g_next;
            program.run();
            std::swap(g, g_next);
        }
        spec_.add(grad_y0, 1.0, grad_outputs);
    }

  private:
    // Assigns the memory from `start` on, and returns its end.
    uintptr_t lay_out(uintptr_t start) {
        Memory memory(start);
        const uintptr_t scalars = memory.take(spec_.scalars_bytes());
        other_ = memory.take(spec_.bytes());
        const size_t inner = inside_.code.function ? 1 + spec_.method.stages() : 0;
        for (Program* program : {&end_only_, &inside_}) {
            program->inputs = {scalars, 0, 0, 0};
            program->prepared = memory.take(program->code.prepared_bytes);
        }
        for (size_t i = 0; i < inner; ++i) inside_.inputs.push_back(memory.take(spec_.bytes()));
        const size_t workspace_bytes = std::max(end_only_.code.workspace_bytes, inside_.code.workspace_bytes);
        end_only_.workspace = inside_.workspace = memory.take(workspace_bytes);
        return memory.end();
    }

    // Sums the cotangents of the outputs inside a step: unweighted, and for each slope weighted by b_i(theta).
    void gather(uintptr_t grad_outputs, const AcceptedStep& step) const {
        const std::vector<uintptr_t>& to = inside_.inputs;
        const size_t stages = spec_.method.stages();
        for (size_t i = 0; i <= stages; ++i) std::memset(at(to[4 + i]), 0, spec_.bytes());
        for (const auto& [index, theta] : step.outputs) {
            if (theta == 1.0) continue;
            const uintptr_t grad = grad_outputs + size_t(index) * spec_.bytes();
            spec_.add(to[4], 1.0, grad);
            for (size_t i = 0; i < stages; ++i) {
                const double w = spec_.method.weight(i, theta);
                if (w != 0) spec_.add(to[5 + i], w, grad);
            }
        }
    }

    const Specification& spec_;
    Program end_only_, inside_;
    uintptr_t other_ = 0;  // memory for the cotangent of every second state
};

}  // namespace aca
