// The executor and the CUDA kernels as Python sees them: NumPy arrays in, NumPy arrays out.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "executor.h"
#include "self_test.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using executor::CurrentDevice;
using executor::Device;
using executor::Fibers;
using executor::GuardedMemory;
using executor::Order;
using executor::Side;

// As vec.cuh numbers them.
constexpr std::array<const char*, 3> kAccessNames = {"load", "store", "reduction"};

template <class Choice>
Choice choose(const char* what, const std::map<std::string, Choice>& choices,
              const std::string& wanted) {
  const auto found = choices.find(wanted);
  if (found != choices.end()) return found->second;
  std::string names;
  for (const auto& choice : choices) names += " " + choice.first;
  throw py::value_error(std::string(what) + " must be one of:" + names + ", got " + wanted);
}

std::unique_ptr<Device> make_device(const std::string& order, uint64_t seed,
                                    const std::string& fibers, int num_multiprocessors,
                                    int launch_error, int launches_before_error,
                                    int compute_capability, bool counts_memory, int64_t l1_bytes,
                                    int l1_ways, bool l1_is_hashed) {
  auto device = std::make_unique<Device>();
  device->order = choose<Order>(
      "order",
      {{"forward", Order::kForward}, {"reverse", Order::kReverse}, {"random", Order::kRandom}},
      order);
  device->seed = seed;
  device->fibers = choose<Fibers>(
      "fibers", {{"native", Fibers::kNative}, {"ucontext", Fibers::kUcontext}}, fibers);
  device->num_multiprocessors = num_multiprocessors;
  device->launch_error = launch_error;
  device->launches_before_error = launches_before_error;
  device->compute_capability = compute_capability;
  device->counts_memory = counts_memory;
  device->cache = {l1_bytes, l1_ways, l1_is_hashed};
  return device;
}

// What was counted, a dict for each array, kind of access and size of a lane's part.
py::list traffic_of(const Device& device) {
  py::list table;
  for (const auto& [key, traffic] : device.traffic) {
    table.append(py::dict("array"_a = key.array, "kind"_a = kAccessNames.at(key.kind),
                          "bytes"_a = key.bytes, "requests"_a = traffic.requests,
                          "lanes"_a = traffic.lanes, "sectors"_a = traffic.sectors,
                          "least_sectors"_a = traffic.least_sectors, "lines"_a = traffic.lines,
                          "hits"_a = traffic.hits));
  }
  return table;
}

// A function of the self-test, with the device as its first argument.
template <class Result, class... Arguments>
auto on_device(Result (*function)(Arguments...)) {
  return [function](Device& device, Arguments... arguments) -> Result {
    const CurrentDevice current(device);
    return function(arguments...);
  };
}

void bind_self_test(py::module_ m) {
  namespace self_test = executor::self_test;
#define MSDA_BIND(name) m.def(#name, on_device(self_test::name))
  MSDA_BIND(shuffle_index);
  MSDA_BIND(shuffle_xor);
  MSDA_BIND(neighbours_in_warp);
  MSDA_BIND(neighbours_in_block);
  MSDA_BIND(unwritten_shared_memory);
  MSDA_BIND(indices_in_order_of_execution);
  MSDA_BIND(atomic_sums);
  MSDA_BIND(count_accesses);
  MSDA_BIND(count_in_two_branches);
  MSDA_BIND(shuffle_with_exited_lane);
  MSDA_BIND(shuffle_with_lane_past_the_end_of_the_block);
  MSDA_BIND(shuffle_reads_lane_that_is_not_named);
  MSDA_BIND(shuffle_is_called_by_lane_that_is_not_named);
  MSDA_BIND(shuffle_by_a_width_of_12);
  MSDA_BIND(shuffles_that_do_not_meet);
  MSDA_BIND(barrier_after_exit_of_a_warp);
  MSDA_BIND(barriers_of_two_branches);
  MSDA_BIND(barrier_against_shuffle);
  MSDA_BIND(barrier_outside_of_kernels);
  MSDA_BIND(kernel_reads_nowhere);
  MSDA_BIND(warp_barrier_after_exit);
  MSDA_BIND(launch_errors);
  MSDA_BIND(launch_on_another_stream);
  MSDA_BIND(kernel_reads_past_the_end);
  MSDA_BIND(kernel_reads_past_the_end_of_shared_memory);
  MSDA_BIND(kernel_reads_host_memory);
  MSDA_BIND(host_reads_device_memory);
  MSDA_BIND(kernel_loads_a_vector_that_is_not_aligned);
#undef MSDA_BIND
}

using msda::DType;

// ---- memory of the device -----------------------------------------------------------------------

// AddressSanitizer has margins of its own, and sees reads too.
size_t margin() { return executor::kHasAddressSanitizer ? 0 : 256; }

// Of CUDA's allocations.
constexpr size_t kAlignment = 256;

// Makes NaN in every dtype.
constexpr unsigned char kPoison = 0xff;

// A device array of exactly the size that is asked for, between margins that hold NaN.
class Buffer {
 public:
  // shift: bytes from an aligned address.
  Buffer(const std::string& name, size_t bytes, size_t shift)
      : bytes_(bytes), margin_(margin()), before_(margin_ + shift) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, before_ + bytes + margin_) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(memory));
    std::memset(memory, kPoison, before_ + bytes + margin_);
    guard_ = std::make_unique<GuardedMemory>(name, data(), bytes, Side::kDevice);
  }

  void* data() const { return memory_.get() + before_; }

  void fill(const void* source) {
    guard_->permit(Side::kDevice);
    std::memcpy(data(), source, bytes_);
    guard_->permit(Side::kHost);
  }

  void read(void* destination) const {
    guard_->permit(Side::kDevice);
    std::memcpy(destination, data(), bytes_);
    guard_->permit(Side::kHost);
  }

  void check_margins(const std::string& name) const {
    for (size_t i = 0; i < before_; ++i) check_margin(name, i);
    for (size_t i = 0; i < margin_; ++i) check_margin(name, before_ + bytes_ + i);
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };

  void check_margin(const std::string& name, size_t i) const {
    if (memory_[i] == kPoison) return;
    throw std::runtime_error("a kernel wrote outside of " + name + ", at byte " +
                             std::to_string(int64_t(i) - int64_t(before_)) + " of " +
                             std::to_string(bytes_));
  }

  size_t bytes_;
  size_t margin_;
  size_t before_;
  std::unique_ptr<unsigned char[], Free> memory_;
  std::unique_ptr<GuardedMemory> guard_;
};

// ---- a call -------------------------------------------------------------------------------------

using Shape = std::vector<py::ssize_t>;
// NumPy has no bfloat16: its arrays are of uint16, so the name of the dtype comes with each array.
using NamedArray = std::pair<py::array, std::string>;
using NamedArrays = std::map<std::string, NamedArray>;

const std::map<std::string, DType> kDTypes = {{"float32", DType::kFloat32},
                                              {"float64", DType::kFloat64},
                                              {"float16", DType::kFloat16},
                                              {"bfloat16", DType::kBFloat16}};

std::string name_of(DType dtype) {
  for (const auto& [name, entry] : kDTypes) {
    if (entry == dtype) return name;
  }
  throw std::logic_error("a dtype without a name");
}

struct Options {
  bool nearest = false;
  std::string device_shapes;         // "int64" or "int32": the shapes lie on the device
  std::set<std::string> misaligned;  // arrays that start one element off an aligned address
  std::set<std::string> in_place;    // arrays too large to be copied, filled or checked
  int split = 0;                     // CudaCall's
  int tile_heads = 0;                // CudaCall's
};

// A problem whose arrays are copies in device memory.
class Call {
 public:
  Call(const NamedArrays& arrays, const std::vector<std::array<int64_t, 2>>& spatial_shapes,
       const std::vector<int64_t>& num_points, const Options& options)
      : arrays_(arrays), options_(options) {
    problem.value = input("value");
    problem.points = input("points");
    problem.weights = input("weights");
    problem.reference_points = input("reference");
    problem.padding_mask = static_cast<const uint8_t*>(input("padding_mask").data);
    problem.is_fused = arrays.count("reference") > 0;
    problem.has_padding_mask = arrays.count("padding_mask") > 0;
    problem.nearest = options.nearest;

    const Shape value = shape_of("value"), points = shape_of("points");
    problem.batch = value.at(0);
    problem.num_keys = value.at(1);
    problem.num_heads = value.at(2);
    problem.head_dim = value.at(3);
    problem.num_queries = points.at(1);
    problem.num_samples = points.at(3);
    if (problem.is_fused) {
      problem.reference_levels = shape_of("reference").at(2);
      problem.reference_size = shape_of("reference").at(3);
    }

    set_levels(spatial_shapes, num_points);
    const bool shapes_on_device = !options.device_shapes.empty();
    cuda_call.stream = executor::current_stream();
    cuda_call.split = options.split;
    cuda_call.tile_heads = options.tile_heads;
    const int64_t table_bytes = msda::level_table_bytes(problem.num_levels, shapes_on_device);
    if (table_bytes > 0) cuda_call.level_table = allocate("level_table", table_bytes).data();
  }

  // Nothing where the array was not given.
  msda::ConstArray input(const std::string& name) {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) return {};
    const auto& [array, dtype] = found->second;
    if (!(array.flags() & py::array::c_style)) throw py::value_error(name + " is not contiguous");
    const DType type = dtype == "bool" ? DType::kFloat32 : kDTypes.at(dtype);
    if (options_.in_place.count(name)) return {array.data(), type};
    Buffer& buffer = allocate(name, array.nbytes(), array.itemsize());
    buffer.fill(array.data());
    return {buffer.data(), type};
  }

  // An array to be written, which holds NaN or, if it is to be added to, zeros.
  msda::Array output(const std::string& name, const Shape& shape, DType dtype,
                     bool with_zeros = false) {
    const std::string type = name_of(dtype);
    const py::object numpy_type = py::dtype(dtype == DType::kBFloat16 ? "uint16" : type);
    // Memory that nobody has touched yet, which is what makes large arrays possible.
    py::array array = py::module_::import("numpy").attr("zeros")(shape, numpy_type);
    results_[name] = {array, type};
    if (options_.in_place.count(name)) return {array.mutable_data(), dtype};
    Buffer& buffer = allocate(name, array.nbytes(), array.itemsize());
    if (with_zeros) buffer.fill(array.data());
    return {buffer.data(), dtype};
  }

  // After the kernels have run.
  NamedArrays results() {
    for (const auto& [name, buffer] : buffers_) buffer->check_margins(name);
    for (const auto& [name, entry] : arrays_) check_unchanged(name, entry.first);
    for (auto& [name, entry] : results_) {
      if (!options_.in_place.count(name)) buffers_.at(name)->read(entry.first.mutable_data());
    }
    return results_;
  }

  Shape shape_of(const std::string& name) const {
    const py::array& array = arrays_.at(name).first;
    return Shape(array.shape(), array.shape() + array.ndim());
  }

  Shape shape_of_output() const {
    return {problem.batch, problem.num_queries, problem.num_heads * problem.head_dim};
  }

  DType sum_type() const {
    return problem.value.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  // Memory that holds NaN.
  Buffer& allocate(const std::string& name, size_t bytes, size_t element_bytes = 1) {
    const size_t shift = options_.misaligned.count(name) ? element_bytes : 0;
    return *(buffers_[name] = std::make_unique<Buffer>(name, bytes, shift));
  }

  msda::Problem problem{};
  msda::CudaCall cuda_call{};

 private:
  void set_levels(const std::vector<std::array<int64_t, 2>>& spatial_shapes,
                  const std::vector<int64_t>& num_points) {
    const bool on_device = !options_.device_shapes.empty();
    int64_t start = 0;
    for (size_t l = 0; l < spatial_shapes.size(); ++l) {
      const auto [height, width] = spatial_shapes[l];
      levels_.push_back(on_device ? msda::Level{0, 0, 0, num_points.at(l)}
                                  : msda::Level{height, width, start, num_points.at(l)});
      start += height * width;
    }
    problem.num_levels = levels_.size();
    problem.levels = levels_.data();
    levels_guard_ = std::make_unique<GuardedMemory>(
        "levels", levels_.data(), levels_.size() * sizeof(msda::Level), Side::kHost);
    if (!on_device) return;
    cuda_call.shapes_on_device = true;
    cuda_call.shapes_are_int64 = options_.device_shapes == "int64";
    const size_t element_bytes = cuda_call.shapes_are_int64 ? 8 : 4;
    std::vector<int64_t> wide;
    std::vector<int32_t> narrow;
    for (const auto& shape : spatial_shapes) {
      wide.insert(wide.end(), shape.begin(), shape.end());
      narrow.insert(narrow.end(), shape.begin(), shape.end());
    }
    Buffer& buffer = allocate("spatial_shapes", wide.size() * element_bytes, element_bytes);
    buffer.fill(cuda_call.shapes_are_int64 ? static_cast<const void*>(wide.data())
                                           : static_cast<const void*>(narrow.data()));
    cuda_call.spatial_shapes = buffer.data();
  }

  void check_unchanged(const std::string& name, const py::array& array) const {
    if (options_.in_place.count(name)) return;
    std::vector<unsigned char> now(array.nbytes());
    buffers_.at(name)->read(now.data());
    if (std::memcmp(now.data(), array.data(), now.size()) != 0) {
      throw std::runtime_error("a kernel wrote to " + name);
    }
  }

  const NamedArrays& arrays_;
  const Options& options_;
  std::vector<msda::Level> levels_;
  std::unique_ptr<GuardedMemory> levels_guard_;
  std::map<std::string, std::unique_ptr<Buffer>> buffers_;
  NamedArrays results_;
};

NamedArrays forward(Device& device, const NamedArrays& arrays,
                    const std::vector<std::array<int64_t, 2>>& spatial_shapes,
                    const std::vector<int64_t>& num_points, const Options& options) {
  const CurrentDevice current(device);
  Call call(arrays, spatial_shapes, num_points, options);
  const msda::ForwardOutputs outputs{
      call.output("output", call.shape_of_output(), call.problem.value.dtype)};
  msda::forward_cuda(call.problem, outputs, call.cuda_call);
  return call.results();
}

NamedArrays backward(Device& device, const NamedArrays& arrays,
                     const std::vector<std::array<int64_t, 2>>& spatial_shapes,
                     const std::vector<int64_t>& num_points, const std::set<std::string>& wanted,
                     const Options& options) {
  const CurrentDevice current(device);
  Call call(arrays, spatial_shapes, num_points, options);
  const msda::Problem& problem = call.problem;
  const msda::BackwardInputs inputs{call.input("grad_output"), call.input("output")};
  const DType sum_type = problem.value.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const bool wants_reference = wanted.count("reference");
  msda::BackwardOutputs outputs;
  if (wanted.count("value")) {
    outputs.grad_value = {call.output("grad_value", call.shape_of("value"), sum_type, true), true};
  }
  if (wanted.count("points") || wants_reference) {
    const DType type = wants_reference ? sum_type : problem.points.dtype;
    outputs.grad_points = {call.output("grad_points", call.shape_of("points"), type), true};
  }
  if (wanted.count("weights")) {
    outputs.grad_weights = {
        call.output("grad_weights", call.shape_of("weights"), problem.weights.dtype), true};
  }
  if (wants_reference) {
    outputs.grad_reference_points = {
        call.output("grad_reference", call.shape_of("reference"), problem.reference_points.dtype),
        true};
  }
  msda::backward_cuda(problem, inputs, outputs, call.cuda_call);
  return call.results();
}

// The gradient of value by sorting, with the steps that the caller of the kernels takes.
NamedArrays gather(Device& device, const NamedArrays& arrays,
                   const std::vector<std::array<int64_t, 2>>& spatial_shapes,
                   const std::vector<int64_t>& num_points, const Options& options) {
  const CurrentDevice current(device);
  Call call(arrays, spatial_shapes, num_points, options);
  const msda::Problem& problem = call.problem;
  const DType sum_type = call.sum_type();
  const msda::SortSizes sizes = msda::sort_sizes(problem, call.cuda_call);
  const int64_t count = sizes.num_samples;
  Buffer& cells = call.allocate("cells", count * sizeof(int32_t));
  Buffer& sorted_cells = call.allocate("sorted_cells", count * sizeof(int32_t));
  Buffer& cell_starts = call.allocate("cell_starts", (sizes.num_cells + 1) * sizeof(int32_t));
  Buffer& sample_order = call.allocate("sample_order", count * sizeof(int64_t));
  Buffer& weights = call.allocate("corner_weights", count * 4 * msda::element_size(sum_type));
  msda::SortedSamples samples;
  samples.cells = static_cast<int32_t*>(cells.data());
  samples.weights = weights.data();
  samples.sorted_cells = static_cast<const int32_t*>(sorted_cells.data());
  samples.cell_starts = static_cast<int32_t*>(cell_starts.data());
  samples.sample_order = static_cast<const int64_t*>(sample_order.data());
  msda::sample_cells_cuda(problem, samples, call.cuda_call);

  std::vector<int32_t> numbers(count);
  std::vector<int64_t> order(count);
  cells.read(numbers.data());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return numbers[a] < numbers[b]; });
  sample_order.fill(order.data());
  std::sort(numbers.begin(), numbers.end());
  sorted_cells.fill(numbers.data());

  const msda::BackwardInputs inputs{call.input("grad_output"), {}};
  const msda::Array grad_value = call.output("grad_value", call.shape_of("value"), sum_type);
  msda::gather_cuda(problem, inputs, grad_value, samples, call.cuda_call);
  return call.results();
}

// (samples, cells) that a deterministic gradient of value sorts.
std::pair<int64_t, int64_t> sort_sizes(int64_t batch, int64_t queries, int64_t heads,
                                       int64_t samples, std::array<int64_t, 2> shape,
                                       bool shapes_on_device) {
  const msda::Level level{shape[0], shape[1], 0, samples};
  msda::Problem problem{};
  problem.batch = batch;
  problem.num_keys = shape[0] * shape[1];
  problem.num_queries = queries;
  problem.num_heads = heads;
  problem.num_levels = 1;
  problem.num_samples = samples;
  problem.levels = &level;
  msda::CudaCall call{};
  call.shapes_on_device = shapes_on_device;
  const msda::SortSizes sizes = msda::sort_sizes(problem, call);
  return {sizes.num_samples, sizes.num_cells};
}

void bind_kernels(py::module_ m) {
  using Names = std::set<std::string>;
  py::class_<Options>(m, "Options")
      .def(py::init([](bool nearest, std::string device_shapes, Names misaligned, Names in_place,
                       int split, int tile_heads) {
             return Options{nearest,
                            std::move(device_shapes),
                            std::move(misaligned),
                            std::move(in_place),
                            split,
                            tile_heads};
           }),
           py::kw_only(), "nearest"_a = false, "device_shapes"_a = "", "misaligned"_a = Names(),
           "in_place"_a = Names(), "split"_a = 0, "tile_heads"_a = 0);
  m.def("forward", &forward, "device"_a, "arrays"_a, "spatial_shapes"_a, "num_points"_a,
        "options"_a);
  m.def("gather", &gather, "device"_a, "arrays"_a, "spatial_shapes"_a, "num_points"_a, "options"_a);
  m.def("sort_sizes", &sort_sizes, py::kw_only(), "batch"_a, "queries"_a, "heads"_a, "samples"_a,
        "shape"_a, "shapes_on_device"_a);
  m.def("backward", &backward, "device"_a, "arrays"_a, "spatial_shapes"_a, "num_points"_a,
        "wanted"_a, "options"_a);
}

}  // namespace

PYBIND11_MODULE(_cuda_executor, m) {
  py::class_<Device>(m, "Device")
      .def(py::init(&make_device), py::kw_only(), "order"_a = "forward", "seed"_a = 0,
           "fibers"_a = "native", "num_multiprocessors"_a = 4, "launch_error"_a = int(cudaSuccess),
           "launches_before_error"_a = 0, "compute_capability"_a = 75, "counts_memory"_a = false,
           "l1_bytes"_a = 0, "l1_ways"_a = 4, "l1_is_hashed"_a = true)
      .def_readonly("last_error", &Device::last_error)
      .def_readonly("num_launches", &Device::num_launches)
      .def_readonly("num_blocks", &Device::num_blocks)
      .def_property_readonly("traffic", &traffic_of);
  bind_self_test(m.def_submodule("self_test"));
  bind_kernels(m);
}
