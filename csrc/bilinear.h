// The maths of one bilinear sample, for host scalars, host SIMD vectors and CUDA threads alike.
//
// A sample at pixel coordinates x = loc_x * W - 1/2, y = loc_y * H - 1/2 (cell centres, as
// grid_sample with align_corners=False) reads the four pixels around it:
//
//     nw --- ne        fx, fy: distance from nw, in [0, 1]
//     |  x   |         v: value of a corner (zero outside the map), A: attention weight,
//     sw --- se        g: grad_output
//
//     sample     = (1-fy) * [(1-fx) * nw + fx * ne] + fy * [(1-fx) * sw + fx * se]
//     output     = sum over levels and points of A * sample
//     grad_v     = A * (corner weight) * g
//     grad_A     = <g, sample>
//     grad_x     = A * <g, (1-fy) * (ne - nw) + fy * (se - sw)>     (times W for loc_x)
//     grad_y     = A * <g, (1-fx) * (sw - nw) + fx * (se - ne)>     (times H for loc_y)
//
// A sample counts if -1 < x < W and -1 < y < H. The test is made in floating point, before any cast
// to an integer, and is written so that NaN fails it.

#pragma once

#ifdef __CUDACC__
#define MSDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MSDA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace msda {

enum Corner { kNw = 0, kNe = 1, kSw = 2, kSe = 3, kNumCorners = 4 };

// One number for each corner.
template <class Real>
struct Corners {
  Real nw, ne, sw, se;
};

// Whether a sample counts. For vectors of samples the result is a mask.
template <class Real>
MSDA_HOST_DEVICE auto sample_counts(Real x, Real y, Real width, Real height) {
  return (x > -1) & (x < width) & (y > -1) & (y < height);
}

// A sample's place along one axis: the first pixel of its cell, and the distance from it, 0 to 1.
template <class Real>
struct Cell {
  Real first;
  Real fraction;
};

// The cell of pixel coordinate x = step * given + origin + rest, where rest is what origin lost to
// rounding. The fraction is computed anew from the given number, not as x - first: on a map 160
// wide, the rounding of x would be 25 times all other errors of the output. The first pixel is x
// truncated; where that, or the rounding of x, put it past the sample, the fraction is negative
// and the first pixel is one less. Where a sample is the small difference of a reference
// point and an offset that both lie beyond 2^23 pixels, the roundings of origin and rest are worth
// pixels; the fraction is clamped, so that the sample stays between the pixels of its cell.
//
// Math has truncate(), clamp() to [0, 1], and multiply_add(), rounded once.
template <class Math, class Real>
MSDA_HOST_DEVICE Cell<Real> find_cell(Real given, Real step, Real origin, Real rest, Real x) {
  const Real first = Math::truncate(x);
  const Real fraction = Math::multiply_add(given, step, origin - first) + rest;
  return {fraction < 0 ? first - 1 : first, Math::clamp(fraction < 0 ? fraction + 1 : fraction)};
}

template <class Real>
MSDA_HOST_DEVICE Corners<Real> corner_weights(Real fx, Real fy) {
  const Real gx = 1 - fx;
  const Real gy = 1 - fy;
  return {gy * gx, gy * fx, fy * gx, fy * fx};
}

// The four dot products <g, v> of a sample as its gradients need them.
template <class Real>
struct SampleGradient {
  Real sample;  // <g, sample>
  Real dx, dy;  // derivative of <g, sample> by the pixel coordinates
};

template <class Real>
MSDA_HOST_DEVICE SampleGradient<Real> sample_gradient(const Corners<Real>& dot, Real fx, Real fy) {
  const Real north = dot.ne - dot.nw;
  const Real south = dot.se - dot.sw;
  const Real top = dot.nw + fx * north;
  const Real bottom = dot.sw + fx * south;
  return {top + fy * (bottom - top), north + fy * (south - north), bottom - top};
}

}  // namespace msda
