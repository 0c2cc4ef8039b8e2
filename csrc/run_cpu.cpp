// Runs the CPU kernels (cpu/kernels.h) on torch's threads.

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>
#include <optional>

#include "cpu/kernels.h"
#include "run.h"

namespace msda {
namespace {

// torch's parallel_for, which hands exceptions through: torch would name only the call that failed.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::atomic<int64_t> missing{0};
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
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
  parallel_for(0, tensor.numel() * tensor.element_size(), 1 << 20,
               [&](int64_t first, int64_t last) { std::memset(bytes + first, 0, last - first); });
}

// With too few heads for the threads, levels are spread over them too.
bool split_by_level(int64_t num_tasks) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t busiest = (num_tasks + threads - 1) / threads;
  return 4 * num_tasks < 3 * busiest * threads;
}

}  // namespace

void run_forward_on_cpu(const Problem& problem, const ForwardOutputs& outputs) {
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(0, problem.batch * problem.num_heads * problem.num_queries,
               grain_size(work_per_query_and_head(problem)), [&](int64_t first, int64_t last) {
                 kernels.forward(problem, outputs, first, last);
               });
}

void run_backward_on_cpu(const Problem& problem, const BackwardInputs& inputs,
                         const BackwardOutputs& outputs, const Tensor& grad_value) {
  const CpuKernels& kernels = cpu_kernels();
  if (sums_in_place(problem)) zero_fill(grad_value);
  const int64_t num_heads = problem.batch * problem.num_heads;
  const bool by_level = problem.num_levels > 1 && split_by_level(num_heads);
  const int64_t num_parts = by_level ? problem.num_levels : 1;
  const int64_t num_rows = num_heads * problem.num_queries;
  BackwardOutputs parts = outputs;
  std::optional<Tensor> softmax_gradient;  // where a task sees only a part of each softmax
  if (by_level && problem.is_fused && outputs.grad_weights.is_wanted) {
    softmax_gradient = new_empty("the scratch space of the softmax's gradient", grad_value,
                                 {num_rows * problem.num_samples}, sum_type(grad_value));
    parts.grad_weights = gradient_array(*softmax_gradient, true);
  }
  parallel_for(0, num_heads * num_parts,
               grain_size(work_per_query_and_head(problem) * problem.num_queries / num_parts),
               [&](int64_t first, int64_t last) {
                 kernels.backward(problem, inputs, parts, by_level, first, last);
               });
  if (softmax_gradient) {
    const ConstArray gradient = const_array(*softmax_gradient);
    parallel_for(0, num_rows, grain_size(16 * problem.num_samples),
                 [&](int64_t first, int64_t last) {
                   kernels.backward_softmax(problem, gradient, outputs, first, last);
                 });
  }
  if (outputs.grad_reference_points.is_wanted) {
    parallel_for(0, problem.batch * problem.num_queries,
                 grain_size(work_per_query_and_head(problem) * problem.num_heads / 4),
                 [&](int64_t first, int64_t last) {
                   kernels.backward_reference_points(problem, outputs, first, last);
                 });
  }
}

}  // namespace msda
