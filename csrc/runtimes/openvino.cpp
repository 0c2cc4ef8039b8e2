// The operator for OpenVINO: an extension that Core.add_extension() takes. Nodes MSDeformAttn and
// MSDeformAttnFused of the domain "msda", as msda.onnx writes them with as_node="msda". Inputs and
// output are used where they lie, and OpenVINO's own threads do the work.

#include <array>
#include <cstring>
#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/frontend/onnx/node_context.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "../msda.h"

namespace {

constexpr size_t kMaxInputs = 6;

// As plugins hand tensors over: the one for CPUs makes bytes of booleans and, where a setting says
// so, 16-bit floats of others.
msda_dtype dtype_of(const ov::element::Type& type, bool is_mask) {
  if (type == ov::element::f32) return MSDA_FLOAT32;
  if (type == ov::element::f64) return MSDA_FLOAT64;
  if (type == ov::element::f16) return MSDA_FLOAT16;
  if (type == ov::element::bf16) return MSDA_BFLOAT16;
  if (type == ov::element::i64) return MSDA_INT64;
  if (type == ov::element::i32) return MSDA_INT32;
  if (type == ov::element::boolean || (is_mask && type == ov::element::u8)) return MSDA_BOOL;
  return type == ov::element::i8 ? MSDA_INT8 : MSDA_UINT8;  // refused by name
}

// A tensor as msda.h takes it.
struct Argument {
  Argument() = default;
  Argument(const ov::Tensor& given, bool is_mask = false)
      : sizes(given.get_shape().begin(), given.get_shape().end()) {
    const size_t item = given.get_element_type().size();
    for (const size_t stride : given.get_strides()) strides.push_back(int64_t(stride / item));
    tensor.data =
        const_cast<void*>(static_cast<const void*>(const_cast<const ov::Tensor&>(given).data()));
    tensor.sizes = sizes.data();
    tensor.strides = strides.data();
    tensor.rank = int32_t(sizes.size());
    tensor.dtype = dtype_of(given.get_element_type(), is_mask);
  }

  std::vector<int64_t> sizes, strides;
  msda_tensor tensor{};
};

// The threads of the inference that runs, as a loop of msda.h.
void inference_loop(void*, int64_t num_tasks, msda_task task, void* state) {
  ov::parallel_for(num_tasks, [&](int64_t index) { task(state, index); });
}

// The parts that both forms share.
class Attention : public ov::op::Op {
 public:
  Attention() = default;
  Attention(const ov::OutputVector& inputs, std::vector<int64_t> num_points, int64_t nearest)
      : Op(inputs), num_points_(std::move(num_points)), nearest_(nearest) {}

  void validate_and_infer_types() override {
    const size_t count = get_input_size();
    const bool has_fitting_count = is_fused() ? count == 5 || count == 6 : count == 4;
    NODE_VALIDATION_CHECK(this, has_fitting_count, "inputs must be ",
                          is_fused() ? "5, or 6 with a padding mask" : "4", ", got ", count);
    // value (B, S, M, D), samples (B, Q, ...): output (B, Q, M * D)
    const ov::PartialShape value = get_input_partial_shape(0);
    const ov::PartialShape samples = get_input_partial_shape(is_fused() ? 3 : 2);
    ov::PartialShape output = ov::PartialShape::dynamic(3);
    if (value.rank().is_static()) {
      NODE_VALIDATION_CHECK(this, value.size() == 4, "value must have shape (B, S, M, D), got ",
                            value);
      output[0] = value[0];
      output[2] = value[2] * value[3];
    }
    if (samples.rank().is_static() && samples.size() > 1) output[1] = samples[1];
    set_output_type(0, get_input_element_type(0), output);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("num_points", num_points_);
    visitor.on_attribute("nearest", nearest_);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    std::array<Argument, kMaxInputs> arguments;
    std::array<const msda_tensor*, kMaxInputs> given{};
    for (size_t i = 0; i < inputs.size() && i < kMaxInputs; ++i) {
      arguments[i] = Argument(inputs[i], i == 5);
      // Moved vectors keep their memory.
      given[i] = &arguments[i].tensor;
    }
    const ov::Shape value = inputs[0].get_shape();
    const ov::Shape samples = inputs[is_fused() ? 3 : 2].get_shape();
    OPENVINO_ASSERT(value.size() == 4 && samples.size() > 1,
                    "value must have shape (B, S, M, D), got ", value);
    outputs[0].set_shape({value[0], samples[1], value[2] * value[3]});
    const Argument output(outputs[0]);
    msda_options options{};
    options.nearest = int32_t(nearest_);
    if (!num_points_.empty()) {
      options.num_points = num_points_.data();
      options.num_counts = int64_t(num_points_.size());
    }
    options.num_threads = parallel_get_max_threads();
    options.loop = inference_loop;
    const int failed =
        is_fused() ? msda_ms_deform_attn_fused(given[0], given[1], nullptr, given[2], given[3],
                                               given[4], given[5], &output.tensor, &options)
                   : msda_ms_deform_attn(given[0], given[1], nullptr, given[2], given[3],
                                         &output.tensor, &options);
    // With one thread, OpenVINO 2026.4 drops what a synchronous inference throws: let nothing pass
    // for a result then. All bits set are a NaN of every type.
    if (failed != MSDA_OK) std::memset(outputs[0].data(), 0xff, outputs[0].get_byte_size());
    OPENVINO_ASSERT(failed == MSDA_OK, msda_last_error());
    return true;
  }

 protected:
  virtual bool is_fused() const = 0;

  std::vector<int64_t> num_points_;  // empty: as many in each level
  int64_t nearest_ = 0;
};

class MSDeformAttn : public Attention {
 public:
  OPENVINO_OP("MSDeformAttn", "msda");
  using Attention::Attention;
  MSDeformAttn(const ov::OutputVector& inputs, std::vector<int64_t> num_points, int64_t nearest)
      : Attention(inputs, std::move(num_points), nearest) {
    constructor_validate_and_infer_types();
  }
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<MSDeformAttn>(inputs, num_points_, nearest_);
  }

 protected:
  bool is_fused() const override { return false; }
};

class MSDeformAttnFused : public Attention {
 public:
  OPENVINO_OP("MSDeformAttnFused", "msda");
  using Attention::Attention;
  MSDeformAttnFused(const ov::OutputVector& inputs, std::vector<int64_t> num_points,
                    int64_t nearest)
      : Attention(inputs, std::move(num_points), nearest) {
    constructor_validate_and_infer_types();
  }
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<MSDeformAttnFused>(inputs, num_points_, nearest_);
  }

 protected:
  bool is_fused() const override { return true; }
};

template <class Node>
std::shared_ptr<ov::Extension> from_onnx() {
  const std::string name = Node::get_type_info_static().name;
  return std::make_shared<ov::frontend::onnx::ConversionExtension>(
      name, "msda", [](const ov::frontend::NodeContext& node) -> ov::OutputVector {
        ov::OutputVector inputs;
        for (size_t i = 0; i < node.get_input_size(); ++i) {
          inputs.push_back(node.get_input(int(i)));
        }
        const auto counts = node.get_attribute<std::vector<int64_t>>("num_points", {});
        const auto nearest = node.get_attribute<int64_t>("nearest", 0);
        return {std::make_shared<Node>(inputs, counts, nearest)};
      });
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<MSDeformAttn>>(),
                                     std::make_shared<ov::OpExtension<MSDeformAttnFused>>(),
                                     from_onnx<MSDeformAttn>(), from_onnx<MSDeformAttnFused>()}));
