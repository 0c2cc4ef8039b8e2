// One function per step, in the order of the header's rules.

#include "definition.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace msda {
namespace fuzz {
namespace {

Ball operator*(const Ball& a, const Ball& b) {
  return {a.middle * b.middle,
          std::fabs(a.middle) * b.radius + std::fabs(b.middle) * a.radius + a.radius * b.radius,
          a.anything || b.anything};
}

// Whether a kernel may compute a zero here, or not read what it is multiplied by, and another right
// one may not.
bool is_uncertain(const Ball& a) {
  if (a.middle == 0 && a.radius == 0) return false;
  return std::fabs(a.middle) <= a.radius || std::fabs(a.middle) < 1e-30;
}

// A product of numbers that may be infinite or NaN.
Ball careful_product(const Ball& a, const Ball& b) {
  Ball product = a * b;
  product.anything |= (!std::isfinite(a.middle) && is_uncertain(b)) ||
                      (!std::isfinite(b.middle) && is_uncertain(a));
  return product;
}

// Of one operation on numbers of this magnitude.
double error_of(double magnitude, const Rounding& rounding) {
  const double of_subnormal = 2 * rounding.relative * rounding.absolute;
  return magnitude == 0 ? 0 : rounding.relative * magnitude + of_subnormal;
}

// A sum as it grows.
struct Sum {
  double middle = 0, magnitude = 0, radius = 0;
  int terms = 0;
  bool anything = false;

  void add(const Ball& term) {
    middle += term.middle;
    magnitude += std::fabs(term.middle);
    radius += term.radius;
    anything |= term.anything;
    ++terms;
  }
  Ball finish(const Rounding& rounding) const {
    return {middle, radius + (terms + 8) * error_of(magnitude, rounding), anything};
  }
};

// ---- where a sample lies along one axis ---------------------------------------------------------

struct AxisPixel {
  int64_t index;
  Ball weight;
  Ball slope;  // derivative of weight by the coordinate
};

struct Axis {
  bool counts = false;            // or may count
  std::vector<AxisPixel> pixels;  // on the map

  void add(int64_t index, int64_t size, double weight, double weight_radius, double slope,
           double slope_radius) {
    if (index < 0 || index >= size) return;
    pixels.push_back({index, {weight, weight_radius}, {slope, slope_radius}});
  }
};

Axis bilinear_axis(double x, double cell_error, double fraction_error, int64_t size) {
  Axis axis;
  if (!std::isfinite(x) || x <= -1 - cell_error || x >= double(size) + cell_error) return axis;
  axis.counts = true;
  const double edge = std::nearbyint(x);
  if (cell_error >= 0.25) {
    for (int64_t i = 0; i < size; ++i) axis.add(i, size, 0.5, 0.5, 0, 1);
  } else if (std::fabs(x - edge) > cell_error) {
    const double first = std::floor(x), fraction = x - first;
    axis.add(int64_t(first), size, 1 - fraction, fraction_error, -1, 0);
    axis.add(int64_t(first) + 1, size, fraction, fraction_error, 1, 0);
  } else {
    const double error = cell_error + fraction_error;
    axis.add(int64_t(edge) - 1, size, 0, error, -0.5, 0.5);
    axis.add(int64_t(edge), size, 1 - error / 2, error, 0, 1);
    axis.add(int64_t(edge) + 1, size, 0, error, 0.5, 0.5);
  }
  return axis;
}

// One pixel, each axis clamped.
Axis nearest_axis(double x, double cell_error, int64_t size) {
  Axis axis;
  if (!std::isfinite(x)) return axis;
  axis.counts = true;
  const auto clamped = [&](double pixel) {
    return int64_t(std::min(std::max(pixel, 0.0), double(size - 1)));
  };
  const double edge = std::nearbyint(x);
  const int64_t before = clamped(edge - 1), after = clamped(edge);
  if (std::fabs(x - edge) > cell_error || before == after) {
    axis.add(clamped(std::trunc(x)), size, 1, 0, 0, 0);
  } else {
    axis.add(before, size, 0.5, 0.5, 0, 0);
    axis.add(after, size, 0.5, 0.5, 0, 0);
  }
  return axis;
}

// ---- one sample ---------------------------------------------------------------------------------

struct Pixel {
  int64_t key;
  Ball weight;
  Ball slope_x, slope_y;
};

struct Sample {
  std::vector<Pixel> pixels;      // that are read: what is padded is not
  bool is_uncertain = false;      // one right kernel may read none of them
  double step_x = 0, step_y = 0;  // pixels per unit of what was given
  double given_x = 0, given_y = 0;
};

class Definition {
 public:
  explicit Definition(const Case& c)
      : c_(c),
        p_(c.problem),
        rounding_(rounding_of(c.computed_in())),
        u_(rounding_.relative),
        value_(decode(c.value)),
        grad_output_(decode(c.grad_output)),
        points_(decode(c.points)),
        weights_(decode(c.weights)),
        reference_(decode(c.reference)) {}

  Expected compute() {
    const int64_t per_head = c_.num_rows();
    expected_.output.resize(per_head * p_.head_dim);
    expected_.grad_points.resize(2 * per_head * p_.num_samples);
    expected_.grad_weights.resize(per_head * p_.num_samples);
    grad_value_.resize(p_.batch * p_.num_keys * p_.num_heads * p_.head_dim);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t q = 0; q < p_.num_queries; ++q) {
        grad_reference_.assign(p_.reference_levels * p_.reference_size, {});
        for (int64_t m = 0; m < p_.num_heads; ++m) compute_head(b, q, m);
        for (const Sum& sum : grad_reference_)
          expected_.grad_reference.push_back(sum.finish(rounding_));
      }
    }
    for (const Sum& sum : grad_value_) expected_.grad_value.push_back(sum.finish(rounding_));
    return std::move(expected_);
  }

 private:
  // As the kernels read it: in the type they compute in.
  std::vector<double> decode(const Stored& stored) const {
    std::vector<double> numbers(stored.size());
    for (int64_t i = 0; i < stored.size(); ++i) {
      const double number = get(stored.dtype, stored.bytes.data(), i);
      numbers[i] = c_.computed_in() == DType::kFloat32 ? double(float(number)) : number;
    }
    return numbers;
  }

  // Weights of one query and head: as given, or softmax of the logits.
  std::vector<Ball> attention(int64_t head) const {
    const double* const given = weights_.data() + head * p_.num_samples;
    std::vector<Ball> weights(p_.num_samples);
    if (!c_.fused) {
      for (size_t k = 0; k < weights.size(); ++k) weights[k].middle = given[k];
      return weights;
    }
    const double tiny = rounding_.absolute;
    double largest = -kInf, sum = 0;
    for (size_t k = 0; k < weights.size(); ++k) {
      largest = given[k] > largest || std::isnan(given[k]) ? given[k] : largest;
    }
    for (size_t k = 0; k < weights.size(); ++k) sum += std::exp(given[k] - largest);
    for (size_t k = 0; k < weights.size(); ++k) {
      const double weight = std::exp(given[k] - largest) / sum;
      const double error = u_ * (8 + double(weights.size()) + (largest - given[k]));
      weights[k] = {weight, weight == 0 ? tiny : weight * error + tiny};
      if (given[k] == -kInf) weights[k].radius = 0;
    }
    return weights;
  }

  Sample make_sample(int64_t b, int64_t q, int64_t level_index, int64_t index) const {
    const Level& level = c_.levels[level_index];
    const double width = double(level.width), height = double(level.height);
    Sample sample;
    sample.given_x = points_[2 * index];
    sample.given_y = points_[2 * index + 1];
    sample.step_x = width;
    sample.step_y = height;
    double origin_x = p_.nearest ? 0.5 : -0.5, origin_y = origin_x;
    if (c_.fused) {
      const double* const reference =
          reference_.data() + ((b * p_.num_queries + q) * p_.reference_levels +
                               (p_.reference_levels == 1 ? 0 : level_index)) *
                                  p_.reference_size;
      origin_x = reference[0] * width - 0.5;
      origin_y = reference[1] * height - 0.5;
      const bool is_box = p_.reference_size == 4;
      const double half_over_points = 0.5 / double(level.num_points);
      sample.step_x = is_box ? width * reference[2] * half_over_points : 1;
      sample.step_y = is_box ? height * reference[3] * half_over_points : 1;
    }
    const Axis x = make_axis(sample.given_x, sample.step_x, origin_x, level.width);
    const Axis y = make_axis(sample.given_y, sample.step_y, origin_y, level.height);
    if (!x.counts || !y.counts) return sample;
    sample.is_uncertain = true;
    for (const AxisPixel& row : y.pixels) {
      for (const AxisPixel& column : x.pixels) {
        const int64_t key = level.start + row.index * level.width + column.index;
        if (!c_.padding_mask.empty() && c_.padding_mask[b * p_.num_keys + key] != 0) continue;
        sample.pixels.push_back({key, row.weight * column.weight, row.weight * column.slope,
                                 row.slope * column.weight});
        sample.is_uncertain &= is_uncertain(sample.pixels.back().weight);
      }
    }
    return sample;
  }

  Axis make_axis(double given, double step, double origin, int64_t size) const {
    const double x = given * step + origin;
    const double cell_error =
        4 * u_ * (1 + std::fabs(x) + std::fabs(origin) + 3 * std::fabs(given * step));
    if (p_.nearest) {
      const bool overflows = c_.computed_in() == DType::kFloat32 && !std::isfinite(float(x));
      return nearest_axis(overflows ? kInf : x, cell_error, size);
    }
    // In double precision this is no more exact than the kernels.
    const double fraction_error = c_.computed_in() == DType::kFloat64 ? cell_error
                                  : c_.fused ? 4 * u_ * (2 + std::fabs(given * step))
                                             : 4 * u_;
    return bilinear_axis(x, cell_error, fraction_error, size);
  }

  // Adds to output and grad_value what one sample contributes.
  void scatter(const Sample& sample, const Ball& attention, int64_t b, int64_t m,
               const double* grad_output, std::vector<Sum>& output) {
    const int64_t D = p_.head_dim;
    for (const Pixel& pixel : sample.pixels) {
      Ball weight = careful_product(attention, pixel.weight);
      if (sample.is_uncertain && !std::isfinite(attention.middle)) weight.anything = true;
      const bool uncertain = is_uncertain(pixel.weight) || is_uncertain(weight);
      const auto times = [&, uncertain](double number) {
        return Ball{weight.middle * number, weight.radius * std::fabs(number),
                    weight.anything || (uncertain && !std::isfinite(number))};
      };
      const int64_t first = ((b * p_.num_keys + pixel.key) * p_.num_heads + m) * D;
      for (int64_t d = 0; d < D; ++d) {
        output[d].add(times(value_[first + d]));
        grad_value_[first + d].add(times(grad_output[d]));
      }
    }
  }

  struct SampleGradients {
    Ball weight;  // <g, sample>
    Ball x, y;    // derivatives of that by the pixel coordinates
  };

  SampleGradients differentiate(const Sample& sample, int64_t b, int64_t m,
                                const double* grad_output) const {
    const int64_t D = p_.head_dim;
    Sum by_weight, by_x, by_y;
    double magnitude = 0;
    for (const Pixel& pixel : sample.pixels) {
      const int64_t first = ((b * p_.num_keys + pixel.key) * p_.num_heads + m) * D;
      Ball dot;
      for (int64_t d = 0; d < D; ++d) {
        const double term = grad_output[d] * value_[first + d];
        dot.middle += term;
        magnitude += std::fabs(term);
      }
      by_weight.add(careful_product(dot, pixel.weight));
      by_x.add(careful_product(dot, pixel.slope_x));
      by_y.add(careful_product(dot, pixel.slope_y));
    }
    const double error = double(D + 8) * error_of(magnitude, rounding_);
    SampleGradients gradients{by_weight.finish(rounding_), by_x.finish(rounding_),
                              by_y.finish(rounding_)};
    for (Ball* ball : {&gradients.weight, &gradients.x, &gradients.y}) {
      ball->radius += error;
      ball->anything |= !std::isfinite(ball->middle) && sample.is_uncertain;
    }
    return gradients;
  }

  // After a few more operations.
  Ball rounded(Ball ball) const {
    ball.radius += 8 * error_of(std::fabs(ball.middle) + ball.radius, rounding_);
    return ball;
  }

  void compute_head(int64_t b, int64_t q, int64_t m) {
    const int64_t D = p_.head_dim, K = p_.num_samples;
    const int64_t head = (b * p_.num_queries + q) * p_.num_heads + m;
    const double* const grad_output = grad_output_.data() + head * D;
    const std::vector<Ball> weights = attention(head);
    std::vector<Sum> output(D);
    std::vector<Ball> by_weight(K);
    bool any_counts = false;
    int64_t k = 0;
    for (int64_t l = 0; l < p_.num_levels; ++l) {
      for (int64_t i = 0; i < c_.levels[l].num_points; ++i, ++k) {
        const int64_t index = head * K + k;
        const Sample sample = make_sample(b, q, l, index);
        if (sample.pixels.empty()) continue;
        any_counts = true;
        scatter(sample, weights[k], b, m, grad_output, output);
        const SampleGradients gradients = differentiate(sample, b, m, grad_output);
        by_weight[k] = gradients.weight;
        if (!p_.nearest) add_point_gradients(sample, weights[k], gradients, l, index);
      }
    }
    for (int64_t d = 0; d < D; ++d) expected_.output[head * D + d] = output[d].finish(rounding_);
    if (c_.fused) {
      by_weight = through_softmax(weights, by_weight, any_counts);
    }
    std::copy(by_weight.begin(), by_weight.end(), expected_.grad_weights.begin() + head * K);
  }

  void add_point_gradients(const Sample& sample, const Ball& weight,
                           const SampleGradients& gradients, int64_t l, int64_t index) {
    Ball by_x = rounded(careful_product(weight, gradients.x));
    Ball by_y = rounded(careful_product(weight, gradients.y));
    for (Ball* ball : {&by_x, &by_y}) {
      ball->anything |= !std::isfinite(ball->middle) && sample.is_uncertain;
    }
    const auto scaled = [&](const Ball& ball, double by) {
      return rounded({ball.middle * by, ball.radius * std::fabs(by), ball.anything});
    };
    expected_.grad_points[2 * index] = scaled(by_x, sample.step_x);
    expected_.grad_points[2 * index + 1] = scaled(by_y, sample.step_y);
    if (!c_.fused) return;
    const Level& level = c_.levels[l];
    const double width = double(level.width), height = double(level.height);
    Sum* const sums =
        grad_reference_.data() + (p_.reference_levels == 1 ? 0 : l) * p_.reference_size;
    sums[0].add(scaled(by_x, width));
    sums[1].add(scaled(by_y, height));
    if (p_.reference_size == 2) return;
    const double half_over_points = 0.5 / double(level.num_points);
    sums[2].add(scaled(by_x, sample.given_x * width * half_over_points));
    sums[3].add(scaled(by_y, sample.given_y * height * half_over_points));
  }

  // grad_logit = p * (grad_p - sum over all samples of p * grad_p).
  std::vector<Ball> through_softmax(const std::vector<Ball>& weights,
                                    const std::vector<Ball>& by_weight, bool any_counts) const {
    Sum sum;
    for (size_t k = 0; k < weights.size(); ++k) sum.add(careful_product(weights[k], by_weight[k]));
    const Ball delta = sum.finish(rounding_);
    std::vector<Ball> gradients(weights.size());
    for (size_t k = 0; k < weights.size(); ++k) {
      const Ball difference = {by_weight[k].middle - delta.middle,
                               by_weight[k].radius + delta.radius,
                               by_weight[k].anything || delta.anything};
      gradients[k] = rounded(careful_product(weights[k], rounded(difference)));
      if (!any_counts) gradients[k].anything = !std::isfinite(weights[k].middle);
    }
    return gradients;
  }

  const Case& c_;
  const Problem& p_;
  const Rounding rounding_;
  const double u_;
  const std::vector<double> value_, grad_output_, points_, weights_, reference_;
  std::vector<Sum> grad_value_, grad_reference_;
  Expected expected_;
};

}  // namespace

Expected compute_expected(const Case& c) { return Definition(c).compute(); }

}  // namespace fuzz
}  // namespace msda
