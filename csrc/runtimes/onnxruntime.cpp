// The operator for ONNX Runtime: a library that SessionOptions.register_custom_ops_library() takes.
// Nodes MSDeformAttn and MSDeformAttnFused of the domain "msda", as msda.onnx writes them with
// as_node="msda". Written against ONNX Runtime's C API. Inputs and output are used where they lie,
// and the session's own threads do the work.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../msda.h"

namespace {

// The oldest interface that has all that is asked for here: ONNX Runtime 1.17's.
constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "onnxruntime_c_api.h must be of 1.17 or newer");
constexpr int kMaxInputs = 6;
constexpr int64_t kMaxRank = 8;

// The types of value, and the type of the other floating-point inputs beside each.
struct Types {
  ONNXTensorElementDataType value, others;
};
constexpr Types kTypes[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
};

// An msda_dtype, or -1 for a type that no input is declared with.
int32_t dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return MSDA_FLOAT32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return MSDA_FLOAT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return MSDA_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return MSDA_BFLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return MSDA_INT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return MSDA_BOOL;
    default:
      return -1;
  }
}

// One node of a model.
struct Kernel {
  const OrtApi* api;
  bool is_fused;
  int64_t nearest = 0;
  std::vector<int64_t> num_points;  // empty: as many in each level
};

// An input or the output as msda.h takes it.
struct Argument {
  msda_tensor tensor{};
  std::array<int64_t, kMaxRank> sizes{};
};

#define RETURN_IF_ERROR(call)                            \
  do {                                                   \
    if (OrtStatus* const status = (call)) return status; \
  } while (false)

OrtStatus* read_sizes(const OrtApi& api, const OrtValue* value, Argument& argument) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtStatus* status = api.GetDimensionsCount(info, &rank);
  if (status == nullptr && rank > kMaxRank) {
    status = api.CreateStatus(ORT_INVALID_ARGUMENT, "inputs must have at most 8 axes");
  }
  if (status == nullptr) status = api.GetDimensions(info, argument.sizes.data(), rank);
  if (status == nullptr) status = api.GetTensorElementType(info, &type);
  api.ReleaseTensorTypeAndShapeInfo(info);
  argument.tensor.sizes = argument.sizes.data();
  argument.tensor.rank = int32_t(rank);
  argument.tensor.dtype = dtype_of(type);
  return status;
}

// The session's threads as a loop of msda.h.
struct Pool {
  const OrtApi* api;
  const OrtKernelContext* context;
  OrtStatus* status = nullptr;
};

struct Tasks {
  msda_task task;
  void* state;
};

void session_loop(void* pool, int64_t num_tasks, msda_task task, void* state) {
  auto& session = *static_cast<Pool*>(pool);
  Tasks tasks{task, state};
  session.status = session.api->KernelContext_ParallelFor(
      session.context,
      [](void* given, size_t index) {
        const auto& these = *static_cast<const Tasks*>(given);
        these.task(these.state, int64_t(index));
      },
      size_t(num_tasks), 0, &tasks);
}

OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const auto& kernel = *static_cast<const Kernel*>(op_kernel);
  const OrtApi& api = *kernel.api;
  std::array<Argument, kMaxInputs> inputs;
  std::array<const msda_tensor*, kMaxInputs> given{};
  size_t num_inputs = 0;
  RETURN_IF_ERROR(api.KernelContext_GetInputCount(context, &num_inputs));
  for (size_t i = 0; i < std::min<size_t>(num_inputs, kMaxInputs); ++i) {
    const OrtValue* value = nullptr;
    RETURN_IF_ERROR(api.KernelContext_GetInput(context, i, &value));
    if (value == nullptr) continue;  // an optional one
    RETURN_IF_ERROR(read_sizes(api, value, inputs[i]));
    RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &inputs[i].tensor.data));
    given[i] = &inputs[i].tensor;
  }

  // value (B, S, M, D), and the fourth input of the fused form, the third of the plain one: (B, Q,
  // ..)
  Argument output;
  const auto &value = inputs[0], &samples = inputs[kernel.is_fused ? 3 : 2];
  if (value.tensor.rank != 4 || samples.tensor.rank < 2) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, "value must have shape (B, S, M, D)");
  }
  output.sizes = {value.sizes[0], samples.sizes[1], value.sizes[2] * value.sizes[3]};
  output.tensor.sizes = output.sizes.data();
  output.tensor.rank = 3;
  output.tensor.dtype = value.tensor.dtype;
  OrtValue* result = nullptr;
  RETURN_IF_ERROR(api.KernelContext_GetOutput(context, 0, output.sizes.data(), 3, &result));
  RETURN_IF_ERROR(api.GetTensorMutableData(result, &output.tensor.data));

  Pool pool{&api, context};
  msda_options options{};
  options.nearest = int32_t(kernel.nearest);
  if (!kernel.num_points.empty()) {
    options.num_points = kernel.num_points.data();
    options.num_counts = int64_t(kernel.num_points.size());
  }
  options.loop = session_loop;
  options.pool = &pool;
  const int failed =
      kernel.is_fused ? msda_ms_deform_attn_fused(given[0], given[1], nullptr, given[2], given[3],
                                                  given[4], given[5], &output.tensor, &options)
                      : msda_ms_deform_attn(given[0], given[1], nullptr, given[2], given[3],
                                            &output.tensor, &options);
  if (pool.status != nullptr) return pool.status;
  if (failed == MSDA_OK) return nullptr;
  return api.CreateStatus(failed == MSDA_INVALID_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_FAIL,
                          msda_last_error());
}

// Attributes that a node has not keep their defaults.
void read_attributes(const OrtApi& api, const OrtKernelInfo* info, Kernel& kernel) {
  size_t count = 0;
  if (OrtStatus* const status =
          api.KernelInfoGetAttributeArray_int64(info, "num_points", nullptr, &count)) {
    api.ReleaseStatus(status);
    count = 0;
  }
  kernel.num_points.resize(count);
  const std::pair<const char*, OrtStatus*> statuses[] = {
      {"num_points", count == 0 ? nullptr
                                : api.KernelInfoGetAttributeArray_int64(
                                      info, "num_points", kernel.num_points.data(), &count)},
      {"nearest", api.KernelInfoGetAttribute_int64(info, "nearest", &kernel.nearest)},
  };
  for (const auto& [name, status] : statuses) {
    if (status != nullptr) api.ReleaseStatus(status);
  }
}

// One of the two operators for one type of value.
struct Operator : OrtCustomOp {
  bool is_fused;
  Types types;

  Operator() = default;
  Operator(bool fused, const Types& given_types)
      : OrtCustomOp{}, is_fused(fused), types(given_types) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) {
      return self(op).is_fused ? "MSDeformAttnFused" : "MSDeformAttn";
    };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* {
      return "CPUExecutionProvider";
    };
    GetInputTypeCount = [](const OrtCustomOp* op) { return size_t(self(op).is_fused ? 6 : 4); };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      return index == 0   ? self(op).types.value
             : index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
             : index == 5 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL
                          : self(op).types.others;
    };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).types.value; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index == 5 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** kernel) -> OrtStatus* {
      auto* const made = new Kernel{api, self(op).is_fused, 0, {}};
      read_attributes(*api, info, *made);
      *kernel = made;
      return nullptr;
    };
    KernelComputeV2 = compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* const api = base->GetApi(kApiVersion);
  // Without an interface there is no status either: an older ONNX Runtime has said so on stderr.
  if (api == nullptr) return nullptr;
  // They must outlive every session.
  static std::vector<Operator> operators = [] {
    std::vector<Operator> made;
    for (const bool is_fused : {false, true}) {
      for (const Types& types : kTypes) made.emplace_back(is_fused, types);
    }
    return made;
  }();
  OrtCustomOpDomain* domain = nullptr;
  RETURN_IF_ERROR(api->CreateCustomOpDomain("msda", &domain));
  for (Operator& one : operators) RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &one));
  return api->AddCustomOpDomain(options, domain);
}
