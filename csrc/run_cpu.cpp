// Runs the CPU kernels (cpu/kernels.h) on torch's threads.

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>

#include "run.h"
#include "split.h"

namespace msda {
namespace {

// torch's parallel_for, which hands exceptions through: torch would name only the call that failed.
template <class F>
void parallel_for(const Loop& loop, const F& f) {
  std::atomic<int64_t> missing{0};
  torch::stable::parallel_for(0, loop.count, loop.grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (const OutOfMemory& error) {
      missing = error.bytes;
    }
  });
  MSDA_CHECK(missing == 0, "the scratch space of the CPU kernels must fit into memory, got ",
             amount(double(missing.load())),
             " for each thread: DefaultCPUAllocator: can't allocate memory");
}

void zero_fill(const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  auto* const bytes = static_cast<char*>(tensor.mutable_data_ptr());
  parallel_for({tensor.numel() * int64_t(tensor.element_size()), 1 << 20},
               [&](int64_t first, int64_t last) { std::memset(bytes + first, 0, last - first); });
}

}  // namespace

void run_forward_on_cpu(const Problem& problem, const ForwardOutputs& outputs) {
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(rows_of(problem), [&](int64_t first, int64_t last) {
    kernels.forward(problem, outputs, first, last);
  });
}

void run_backward_on_cpu(const Problem& problem, const BackwardInputs& inputs,
                         const BackwardOutputs& outputs, const Tensor& grad_value) {
  const CpuKernels& kernels = cpu_kernels();
  if (sums_in_place(problem)) zero_fill(grad_value);
  const bool wants_samples = outputs.grad_points.is_wanted || outputs.grad_weights.is_wanted;
  if (backward_in_two_passes(problem, torch::stable::get_num_threads())) {
    if (wants_samples) {
      parallel_for(rows_of(problem), [&](int64_t first, int64_t last) {
        kernels.backward_samples(problem, inputs, outputs, first, last);
      });
    }
    if (outputs.grad_value.is_wanted) {
      parallel_for(channel_parts_of(problem), [&](int64_t first, int64_t last) {
        kernels.backward_value(problem, inputs, outputs, first, last);
      });
    }
  } else if (outputs.grad_value.is_wanted || wants_samples) {
    parallel_for(heads_of(problem), [&](int64_t first, int64_t last) {
      kernels.backward(problem, inputs, outputs, first, last);
    });
  }
  if (outputs.grad_reference_points.is_wanted) {
    const int64_t work = work_per_query_and_head(problem) * problem.num_heads / 4;
    parallel_for({problem.batch * problem.num_queries, grain_size(work)},
                 [&](int64_t first, int64_t last) {
                   kernels.backward_reference_points(problem, outputs, first, last);
                 });
  }
}

}  // namespace msda
