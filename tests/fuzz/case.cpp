// From bytes to a case.

#include "case.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>

#include "numbers.h"

namespace msda {
namespace fuzz {
namespace {

// Keeps a case to some tenths of a millisecond.
constexpr int64_t kMostWork = 12000;  // samples times channels, or elements of value

uint64_t scramble(uint64_t x) {  // the last step of SplitMix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Draws the numbers of one tensor: random ones, and special ones at a rate of its own.
class Numbers {
 public:
  Numbers(Bytes& bytes, const Case& c)
      : bytes_(bytes),
        specials_(c.has_special_numbers ? bytes.pick({0, 0, 0, 1, 8, 64, 128}) : 0) {}

  // Whether the next number is to be a special one.
  bool special() { return specials_ > 0 && bytes_.next() >= 256 - specials_; }

  double real(double low, double high, std::initializer_list<double> specials) {
    return special() ? bytes_.pick(specials) : bytes_.uniform(low, high);
  }

 private:
  Bytes& bytes_;
  const int specials_;
};

Stored allocate(DType dtype, int64_t size) {
  return {dtype, std::vector<uint8_t>(size * element_size(dtype))};
}

void fill(Stored& stored, Numbers& numbers, double low, double high,
          std::initializer_list<double> specials) {
  for (int64_t i = 0; i < stored.size(); ++i) {
    put(stored.dtype, stored.bytes.data(), i, numbers.real(low, high, specials));
  }
}

void draw_sizes(Bytes& bytes, Case& c) {
  Problem& p = c.problem;
  p.batch = bytes.pick({1, 1, 1, 2, 3});
  p.num_heads = bytes.pick({1, 1, 2, 3, 4, 8});
  p.num_queries = bytes.pick({0, 1, 1, 2, 3, 4, 5, 7, 9, 16, 40});
  p.head_dim = bytes.next();
  p.head_dim = p.head_dim < 224 ? 1 + p.head_dim % 40
                                : bytes.pick({48, 63, 64, 65, 71, 96, 128, 130, 160, 257});
  p.num_levels = bytes.pick({1, 1, 2, 2, 3, 4, 5, 9, 17, 20});
  const int most_points = bytes.pick({1, 1, 2, 3, 4, 4, 6, 8, 13, 17});
  const bool ragged = bytes.pick({false, false, true});
  const int kind_of_map = bytes.pick({0, 0, 0, 1, 2});
  for (int64_t l = 0; l < p.num_levels; ++l) {
    Level level{1 + bytes.next() % 7, 1 + bytes.next() % 7, p.num_keys,
                ragged ? bytes.next() % (most_points + 1) : most_points};
    if (kind_of_map == 1 && l == 0) level = {1, 1 + bytes.next() * 3, p.num_keys, level.num_points};
    if (kind_of_map == 2 && l == 0) level = {1 + bytes.next(), 2, p.num_keys, level.num_points};
    p.num_keys += level.height * level.width;
    p.num_samples += level.num_points;
    c.levels.push_back(level);
  }
  // Halve what is largest until the case is small.
  while (p.batch * p.num_heads * p.head_dim * p.num_keys > kMostWork ||
         p.batch * p.num_heads * p.head_dim * p.num_queries * p.num_samples > kMostWork) {
    int64_t* const largest = std::max({&p.batch, &p.num_heads, &p.head_dim, &p.num_queries},
                                      [](auto* a, auto* b) { return *a < *b; });
    *largest = (*largest + 1) / 2;
    if (*largest == 1) break;
  }
}

// The reference of one query and level: pixel coordinate of the origin and of one unit of an
// offset.
struct Unit {
  double origin_x, origin_y, step_x, step_y;
};

Unit unit_of(const Case& c, int64_t b, int64_t q, int64_t l) {
  const Problem& p = c.problem;
  const Level& level = c.levels[l];
  if (!c.fused) return {-0.5, -0.5, double(level.width), double(level.height)};
  const int64_t first =
      ((b * p.num_queries + q) * p.reference_levels + (p.reference_levels == 1 ? 0 : l)) *
      p.reference_size;
  const auto number = [&](int64_t i) {
    return get(c.reference.dtype, c.reference.bytes.data(), first + i);
  };
  Unit unit{number(0) * double(level.width) - 0.5, number(1) * double(level.height) - 0.5, 1, 1};
  if (p.reference_size == 4) {
    const double half_over_points = 0.5 / double(std::max<int64_t>(1, level.num_points));
    unit.step_x = number(2) * double(level.width) * half_over_points;
    unit.step_y = number(3) * double(level.height) * half_over_points;
  }
  return unit;
}

// What to give for a sample along one axis of a map: most land on it or beside it.
double draw_point(Bytes& bytes, Numbers& numbers, double origin, double step, int64_t size) {
  double pixel = bytes.uniform(-1.3, double(size) + 0.3);
  if (numbers.special()) {
    const double given =
        bytes.pick({0.0, -0.0, 1.0, 0.5, kNaN, kInf, -kInf, 1e30, -3e38, 1e-40, 1e300});
    if (bytes.pick({true, false, false})) return given;
    pixel = std::floor(pixel) + bytes.pick({0.0, 0.0, 0.5});  // at an edge of a cell
  }
  return (pixel - origin) / step;
}

void draw_points(Bytes& bytes, Case& c) {
  const Problem& p = c.problem;
  Numbers numbers(bytes, c);
  const bool near = c.fused && bytes.pick({true, false});  // offsets as a network gives them
  int64_t i = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t q = 0; q < p.num_queries; ++q) {
      std::vector<Unit> units;
      for (int64_t l = 0; l < p.num_levels; ++l) units.push_back(unit_of(c, b, q, l));
      for (int64_t m = 0; m < p.num_heads; ++m) {
        for (int64_t l = 0; l < p.num_levels; ++l) {
          for (int64_t k = 0; k < c.levels[l].num_points; ++k) {
            const Unit& unit = units[l];
            for (const bool vertical : {false, true}) {
              const double number =
                  near ? numbers.real(-4, 4, {0.0, 1.0, -2.0, 0.5, kNaN, kInf, -kInf, 1e30})
                       : draw_point(bytes, numbers, vertical ? unit.origin_y : unit.origin_x,
                                    vertical ? unit.step_y : unit.step_x,
                                    vertical ? c.levels[l].height : c.levels[l].width);
              put(c.points.dtype, c.points.bytes.data(), i++, number);
            }
          }
        }
      }
    }
  }
}

void draw_reference(Bytes& bytes, Case& c) {
  Numbers numbers(bytes, c);
  // Far off, from where offsets come back.
  const double far = bytes.pick({0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0x1p10, 0x1p22, 0x1p25, -0x1p28});
  for (int64_t i = 0; i < c.reference.size(); ++i) {
    const bool is_side = i % c.problem.reference_size >= 2;
    const double number =
        is_side ? numbers.real(0.05, 1, {0.0, 1.0, -0.5, 1e-20, 1e20, kNaN, kInf})
                : numbers.real(-0.2, 1.2, {0.0, 1.0, 0.5, -1.0, kNaN, kInf, -kInf, 1e30}) + far;
    put(c.reference.dtype, c.reference.bytes.data(), i, number);
  }
}

}  // namespace

Bytes::Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {
  for (int i = 0; i < 8 && at_ < end_; ++i) state_ = state_ << 8 | *at_++;
}

uint64_t Bytes::random() { return scramble(state_ += 0x9e3779b97f4a7c15u); }

uint8_t Bytes::next() { return at_ < end_ ? *at_++ : uint8_t(random() >> 56); }

double Bytes::uniform(double low, double high) {
  return low + (high - low) * double(random() >> 11) * 0x1p-53;
}

std::vector<uint8_t> bytes_of_seed(uint64_t seed) {
  std::vector<uint8_t> bytes;
  for (int i = 56; i >= 0; i -= 8) bytes.push_back(uint8_t(scramble(seed + 1) >> i));
  return bytes;
}

const char* name_of(DType dtype) {
  const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[int(dtype)];
}

Case make_case(Bytes bytes) {
  Case c;
  Problem& p = c.problem;
  draw_sizes(bytes, c);
  const auto any_type = [&] {
    return bytes.pick({DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16});
  };
  const int form = bytes.next() % 8;  // plain, nearest, 4 times fused, each shared or not
  c.fused = form >= 2;
  p.nearest = form == 1;
  const DType type = any_type();
  const bool mixed = bytes.pick({false, true});
  const int64_t per_head = p.batch * p.num_queries * p.num_heads;
  const int64_t output_size = per_head * p.head_dim;
  const auto other_type = [&] { return mixed ? any_type() : type; };
  c.value = allocate(type, p.batch * p.num_keys * p.num_heads * p.head_dim);
  c.grad_output = allocate(type, output_size);
  c.points = allocate(other_type(), 2 * per_head * p.num_samples);
  c.weights = allocate(other_type(), per_head * p.num_samples);
  if (c.fused) {
    p.reference_size = form % 2 == 0 ? 2 : 4;
    p.reference_levels = bytes.pick({true, true, false}) ? p.num_levels : 1;
    c.reference =
        allocate(other_type(), p.batch * p.num_queries * p.reference_levels * p.reference_size);
    if (bytes.pick({true, false})) c.padding_mask.resize(p.batch * p.num_keys);
  }

  const uint8_t wanted = bytes.next();
  c.wants_value = wanted & 1;
  c.wants_points = wanted & 2;
  c.wants_weights = wanted & 4;
  c.wants_reference = c.fused && (wanted & 8);
  c.placement = {bytes.pick({true, true, false}),
                 bytes.pick({0, 0, 0, 0, 1, 2, 3, 4, 5, 8, 12, 16, 20})};
  c.has_special_numbers = bytes.pick({false, true});
  c.two_passes = bytes.pick({false, true});
  for (int i = bytes.next() % 4; i > 0; --i) c.cuts.push_back(bytes.next());
  c.repeats = bytes.pick({false, false, false, true});

  // Of 16 bits, sums must stay below 65504.
  const std::initializer_list<double> specials = {kNaN, kInf, -kInf, 0.0, -0.0, 1e-40, 6e-8, 100.0};
  for (Stored* stored : {&c.value, &c.grad_output}) {
    Numbers numbers(bytes, c);
    fill(*stored, numbers, -4, 4, specials);
  }
  Numbers numbers(bytes, c);
  if (c.fused) {
    fill(c.weights, numbers, -5, 5, {kNaN, kInf, -kInf, 0.0, 100.0, -100.0, -90.0, 1e4, -1e30});
    draw_reference(bytes, c);
  } else {
    fill(c.weights, numbers, -0.5, 2, {kNaN, kInf, -kInf, 0.0, -0.0, 1e-40, 1.0});
  }
  draw_points(bytes, c);
  // What is not 0 is true, and C++ code elsewhere may have written any byte.
  for (uint8_t& byte : c.padding_mask) byte = bytes.pick({0, 0, 0, 0, 0, 1, 1, 255});
  return c;
}

std::string Case::describe() const {
  std::ostringstream text;
  const char* const forms[] = {"plain", "nearest", "points", "boxes"};
  text << forms[fused ? problem.reference_size / 2 + 1 : problem.nearest] << " B=" << problem.batch
       << " Q=" << problem.num_queries << " M=" << problem.num_heads << " D=" << problem.head_dim
       << " levels=";
  for (const Level& level : levels) {
    text << level.height << "x" << level.width << "*" << level.num_points << ",";
  }
  text << " value " << name_of(value.dtype) << ", points " << name_of(points.dtype) << ", weights "
       << name_of(weights.dtype);
  if (fused) {
    text << ", reference " << name_of(reference.dtype) << " of " << problem.reference_levels
         << " levels";
  }
  if (!padding_mask.empty()) text << ", padded";
  text << ", wants " << (wants_value ? "v" : "") << (wants_points ? "p" : "")
       << (wants_weights ? "w" : "") << (wants_reference ? "r" : "") << ", "
       << (two_passes ? "in two passes, " : "") << (placement.at_end ? "ends" : "begins")
       << " at a page"
       << " but for " << placement.skew << " bytes";
  return text.str();
}

}  // namespace fuzz
}  // namespace msda
