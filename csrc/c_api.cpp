// The C interface (msda.h): the checks of call.h on a caller's arrays, and a parallel loop.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "msda.h"
#ifdef __linux__
#include <sched.h>
#endif

#include "call.h"
#include "split.h"

namespace msda {
namespace {

constexpr int kMaxTensorRank = 8;  // for messages: no argument has more than 6 axes

struct TypeRow {
  const char* name;
  Type type;
  int64_t size;  // bytes
};

// By msda_dtype.
constexpr TypeRow kTypes[] = {
    {"float32", Type::kFloat32, 4},   {"float64", Type::kFloat64, 8},
    {"float16", Type::kFloat16, 2},   {"bfloat16", Type::kBFloat16, 2},
    {"int64", Type::kInt64, 8},       {"int32", Type::kInt32, 4},
    {"bool", Type::kBool, 1},         {"int8", Type::kOther, 1},
    {"uint8", Type::kOther, 1},       {"int16", Type::kOther, 2},
    {"uint16", Type::kOther, 2},      {"uint32", Type::kOther, 4},
    {"uint64", Type::kOther, 8},      {"complex64", Type::kOther, 8},
    {"complex128", Type::kOther, 16},
};
constexpr int32_t kNumTypes = sizeof(kTypes) / sizeof(kTypes[0]);
static_assert(kNumTypes == MSDA_COMPLEX128 + 1, "each msda_dtype must have a row");

// A caller's array, or a copy of it without gaps.
class Tensor {
 public:
  explicit Tensor(const msda_tensor* given) : given_(given) {
    if (given == nullptr) return;
    data_ = given->data;
    if (given->rank >= 0 && given->rank <= kMaxTensorRank && given->sizes != nullptr) {
      sizes_.assign(given->sizes, given->sizes + given->rank);
    }
  }

  const msda_tensor* given() const { return given_; }
  const Sizes& sizes() const { return sizes_; }
  const TypeRow& type() const { return kTypes[given_->dtype]; }
  bool has_known_type() const { return given_->dtype >= 0 && given_->dtype < kNumTypes; }
  void* data() const { return data_; }

  bool is_empty() const {
    for (const int64_t size : sizes_) {
      if (size == 0) return true;
    }
    return false;
  }

  bool is_contiguous() const {
    if (given_->strides == nullptr || is_empty() || copy_ != nullptr) return true;
    int64_t step = 1;
    for (size_t i = sizes_.size(); i-- > 0; step *= sizes_[i]) {
      if (sizes_[i] != 1 && given_->strides[i] != step) return false;
    }
    return true;
  }

  Tensor copied(const char* name) const {
    double wanted = double(type().size);
    for (const int64_t size : sizes_) wanted *= double(size);
    void* const memory = wanted < double(INT64_MAX) ? std::malloc(size_t(wanted)) : nullptr;
    if (memory == nullptr) {
      throw OutOfMemoryFor{std::string(name) +
                           " must fit into memory once more, without gaps, got " +
                           to_string(sizes_) + " of " + type().name + " on cpu"};
    }
    Tensor copy = *this;
    copy.copy_.reset(memory, std::free);
    copy.data_ = memory;
    auto* target = static_cast<char*>(memory);
    copy_axis(0, static_cast<const char*>(data_), target);
    return copy;
  }

  struct OutOfMemoryFor {
    std::string message;
  };

 private:
  void copy_axis(size_t axis, const char* source, char*& target) const {
    const int64_t size = type().size;
    if (axis == sizes_.size()) {
      std::memcpy(target, source, size);
      target += size;
      return;
    }
    for (int64_t i = 0; i < sizes_[axis]; ++i) {
      copy_axis(axis + 1, source + i * given_->strides[axis] * size, target);
    }
  }

  const msda_tensor* given_;
  void* data_ = nullptr;
  Sizes sizes_;
  std::shared_ptr<void> copy_;
};

}  // namespace

template <>
struct TensorTraits<Tensor> {
  static Type type(const Tensor& tensor) {
    return tensor.has_known_type() ? tensor.type().type : Type::kOther;
  }
  static std::string type_name(const Tensor& tensor) {
    return tensor.has_known_type() ? tensor.type().name
                                   : "a dtype of number " + std::to_string(tensor.given()->dtype);
  }
  static void check_layout(const Tensor& tensor, const char* name) {
    const msda_tensor* const given = tensor.given();
    MSDA_CHECK(given != nullptr, name, " must be given, got null");
    MSDA_CHECK(given->rank >= 0 && given->rank <= kMaxTensorRank, name,
               " must have a rank of 0 to 8, got ", given->rank);
    MSDA_CHECK(given->sizes != nullptr || given->rank == 0, name, " must have sizes, got null");
    for (const int64_t size : tensor.sizes()) {
      MSDA_CHECK(size >= 0, name, " must have sizes of at least 0, got ",
                 to_string(tensor.sizes()));
    }
  }
  static bool is_on_host(const Tensor&) { return true; }
  static bool has_same_device(const Tensor&, const Tensor&) { return true; }
  static std::string device_name(const Tensor&) { return "cpu"; }
  static const Sizes& sizes(const Tensor& tensor) { return tensor.sizes(); }
  static void check_extent(const Tensor& tensor, const char* name) {
    MSDA_CHECK(tensor.data() != nullptr || tensor.is_empty(), name, " must have data, got null");
  }
  static void check_device(const Tensor&) {}
  static Tensor contiguous(const Tensor& tensor, const char* name, bool /*in_pairs*/) {
    return tensor.is_contiguous() ? tensor : tensor.copied(name);
  }
  static const void* data(const Tensor& tensor) { return tensor.data(); }
};

namespace {

thread_local std::string last_error;

// ---- the loop -----------------------------------------------------------------------------------

// The processors that this process may run on.
int available_threads() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

int default_threads() {
  const char* const wanted = std::getenv("OMP_NUM_THREADS");
  const int threads = wanted == nullptr ? 0 : std::atoi(wanted);
  return threads > 0 ? threads : available_threads();
}

// One task for each thread, the caller's among them. The others are made for the call: that takes
// some 20 us each, where a task takes 70 or more, and leaves nothing behind that waits busily or
// does not survive a fork. The tasks of threads that cannot be made run here.
void own_loop(void*, int64_t num_tasks, msda_task task, void* state) {
  std::vector<std::thread> threads;
  threads.reserve(num_tasks - 1);
  int64_t next = 0;
  try {
    for (; next < num_tasks - 1; ++next) threads.emplace_back(task, state, next);
  } catch (const std::system_error&) {
  }
  for (; next < num_tasks; ++next) task(state, next);
  for (std::thread& thread : threads) thread.join();
}

struct Work {
  const Problem& problem;
  const ForwardOutputs& outputs;
  const CpuKernels& kernels;
  int64_t num_rows, num_tasks;
  std::atomic<int64_t> missing{0};  // bytes of scratch space that there was no memory for

  int64_t begin_of(int64_t task) const {
    return num_rows / num_tasks * task + num_rows % num_tasks * task / num_tasks;
  }

  static void run(void* state, int64_t task) {
    auto& work = *static_cast<Work*>(state);
    try {
      work.kernels.forward(work.problem, work.outputs, work.begin_of(task),
                           work.begin_of(task + 1));
    } catch (const OutOfMemory& error) {
      work.missing = error.bytes;
    }
  }
};

void run_forward(const Problem& problem, const ForwardOutputs& outputs,
                 const msda_options& options) {
  const Loop rows = rows_of(problem);
  const int wanted = options.num_threads > 0 ? options.num_threads : default_threads();
  const int64_t num_tasks = rows.num_threads(wanted);
  Work work{problem, outputs, cpu_kernels(), rows.count, num_tasks};
  if (num_tasks == 1) {
    Work::run(&work, 0);
  } else {
    (options.loop != nullptr ? options.loop : own_loop)(options.pool, num_tasks, Work::run, &work);
  }
  if (work.missing != 0) throw OutOfMemory{work.missing};
}

// ---- a call -------------------------------------------------------------------------------------

// The arguments of a call, not yet checked.
struct Given {
  explicit Given(const msda_tensor* value_given, const msda_tensor* shapes_given,
                 const msda_tensor* start_given, const msda_options* options_given)
      : value(value_given),
        spatial_shapes(Tensor(shapes_given)),
        options(options_given != nullptr ? *options_given : msda_options{}) {
    if (start_given != nullptr) level_start_index.emplace(start_given);
    MSDA_CHECK(options.num_threads >= 0, "num_threads must not be negative, got ",
               options.num_threads);
    if (options.num_points == nullptr) return;
    MSDA_CHECK(options.num_counts > 0, "num_points must hold one count per level, got ()");
    num_points.assign(options.num_points, options.num_points + options.num_counts);
  }

  Pyramid<Tensor> pyramid() const {
    return {value, no_numbers, spatial_shapes, level_start_index, num_points};
  }

  Tensor value;
  std::optional<Tensor> spatial_shapes, level_start_index;
  msda_options options;
  Sizes num_points;
  const Sizes no_numbers{};
};

void compute(const Given& given, Call<Tensor>& call, const msda_tensor* output_given) {
  const Tensor output(output_given);
  check(output, kOutput, call.known);
  MSDA_CHECK(output.is_contiguous(), kOutput.name, " must be contiguous, got strides ",
             to_string(Sizes(output_given->strides, output_given->strides + output_given->rank)));
  if (output.is_empty()) return;
  const Problem& problem = call.problem;
  run_forward(problem, ForwardOutputs{Array{output.data(), problem.value.dtype}}, given.options);
}

template <class F>
int guarded(const F& f) {
  try {
    f();
    return MSDA_OK;
  } catch (const OutOfMemory& error) {
    last_error = "the scratch space of the CPU kernels must fit into memory, got " +
                 std::to_string(error.bytes) + " bytes for each thread";
  } catch (const Tensor::OutOfMemoryFor& error) {
    last_error = error.message;
  } catch (const std::bad_alloc&) {
    last_error = "the metadata of a call must fit into memory, got none";
  } catch (const std::exception& error) {
    last_error = error.what();
    return MSDA_INVALID_ARGUMENT;
  }
  return MSDA_OUT_OF_MEMORY;
}

}  // namespace
}  // namespace msda

extern "C" {

int msda_ms_deform_attn(const msda_tensor* value, const msda_tensor* spatial_shapes,
                        const msda_tensor* level_start_index, const msda_tensor* sampling_locations,
                        const msda_tensor* attention_weights, const msda_tensor* output,
                        const msda_options* options) {
  using namespace msda;
  return guarded([&] {
    const Given given(value, spatial_shapes, level_start_index, options);
    const Tensor locations(sampling_locations), weights(attention_weights);
    const Pyramid<Tensor> pyramid = given.pyramid();
    Call<Tensor> call = plain_call(pyramid, locations, weights, given.options.nearest != 0);
    compute(given, call, output);
  });
}

int msda_ms_deform_attn_fused(const msda_tensor* value, const msda_tensor* spatial_shapes,
                              const msda_tensor* level_start_index,
                              const msda_tensor* reference_points,
                              const msda_tensor* sampling_offsets,
                              const msda_tensor* attention_logits, const msda_tensor* padding_mask,
                              const msda_tensor* output, const msda_options* options) {
  using namespace msda;
  return guarded([&] {
    const Given given(value, spatial_shapes, level_start_index, options);
    MSDA_CHECK(given.options.nearest == 0, "nearest must be 0 for the fused form, got ",
               given.options.nearest);
    const Tensor reference(reference_points), offsets(sampling_offsets), logits(attention_logits);
    std::optional<Tensor> mask;
    if (padding_mask != nullptr) mask.emplace(padding_mask);
    const Pyramid<Tensor> pyramid = given.pyramid();
    Call<Tensor> call = fused_call(pyramid, reference, offsets, logits, mask);
    compute(given, call, output);
  });
}

const char* msda_last_error(void) { return msda::last_error.c_str(); }

int msda_num_threads(void) { return msda::default_threads(); }

const char* msda_version(void) { return MSDA_VERSION; }

const char* msda_arguments(void) {
  static const std::string text = msda::describe_arguments();
  return text.c_str();
}

const char* msda_cpu_capability(void) {
  try {
    return msda::cpu_kernels().capability;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

const char* msda_compiled_cpu_capabilities(void) { return msda::compiled_cpu_capabilities(); }

const char* msda_supported_cpu_capabilities(void) { return msda::supported_cpu_capabilities(); }

}  // extern "C"
