// fuse_streams: the arithmetic of one voxel, written once for every native backend, and the C interface.
//
// Shapes: N batch, Ci image channels, Cf feature channels, D H W voxels, d h w coarse voxels.
//   y[n, c]      = scale[n, c] · (x[n, c] - shift) · gain             c < Ci
//   y[n, Ci + c] = scale[n, Ci + c] · Σ over 8 taps of weight · (f[n, c] - shift) · gain
#pragma once

#include "../native.h"

#include <cmath>

#ifdef __CUDACC__
#define DGF_HD __host__ __device__ inline
#else
#define DGF_HD inline
#endif

extern "C" {

struct FuseStreamsTensor {
  void* data;
  int32_t type;        // Type of kernels/native.h
  int64_t strides[5];  // in elements: n, c, z, y, x
};

struct FuseStreamsArguments {
  int64_t bytes;  // sizeof(FuseStreamsArguments), so that a library of another version refuses
  int64_t batch, image_channels, feature_channels, out_channels;
  int64_t size[3];    // D, H, W
  int64_t coarse[3];  // d, h, w
  FuseStreamsTensor image, features;
  FuseStreamsTensor out;  // forward: written, dense, NCDHW or channels-last; backward: the gradient, any strides
  const float* scale;     // (N, Ci + Cf); 0 = dropped
  float* image_stats;     // (N, 2): shift, gain
  float* feature_stats;   // instance: (N, Cf, 2): shift, gain; unit, standard: (N, 2, d, h, w); none: null
  FuseStreamsTensor grad_features;  // backward: (N, Cf, d, h, w) dense, or data null; float32, on the CPU any result type
  FuseStreamsTensor grad_image;  // backward: dense, or data null
  int32_t image_norm;     // ImageNorm
  int32_t feature_norm;   // FeatureNorm
  float norm_a, norm_b;   // window: lo, hi; z-score: mean, standard deviation
  float eps;
  int32_t threads;        // on the CPU
  void* stream;           // on a GPU: cudaStream_t
};
}

namespace {

enum ImageNorm : int32_t { kMinMax = 0, kNoImageNorm = 1, kWindow = 2, kZScore = 3 };
enum FeatureNorm : int32_t { kInstance = 0, kUnit = 1, kStandard = 2, kNoFeatureNorm = 3 };

constexpr float kLargest = 3.402823466e38f;   // FLT_MAX
constexpr float kSmallest = 1.175494351e-38f; // FLT_MIN: a smaller span has no reciprocal

// The two coarse voxels that an output voxel lies between, and the weight of the upper one.
struct Tap {
  int64_t lo, hi;
  float weight;
};

// Half-pixel centres, edges clamped: source = (i + 1/2) · coarse / size - 1/2. In integers, so that it is exact.
DGF_HD Tap tap(int64_t i, int64_t size, int64_t coarse) {
  int64_t numerator = (2 * i + 1) * coarse - size;  // source · 2 · size
  if (numerator < 0) numerator = 0;
  const int64_t lo = numerator / (2 * size), rest = numerator - lo * 2 * size;
  const int64_t hi = rest && lo + 1 < coarse ? lo + 1 : lo;  // what has no weight is not read
  return {lo, hi, float(rest) / float(2 * size)};
}

// The same tap of one voxel after another, with no division but the first: the position advances by coarse / size ≤ 1.
// In 32 bits, in which a GPU is at home: for axes of at most 2¹⁵ voxels.
struct TapWalk {
  int32_t lo, rest, step, period, last;  // position = lo + rest / period; rest < 0 before the first centre
  float unit;                            // 1 / period

  DGF_HD static TapWalk from(int32_t i, int32_t size, int32_t coarse) {
    const int32_t period = 2 * size, before = uint32_t(2 * i + 1) * uint32_t(coarse) < uint32_t(size);
    const uint32_t numerator = before ? 0 : uint32_t(2 * i + 1) * uint32_t(coarse) - uint32_t(size);
    const int32_t lo = int32_t(numerator / uint32_t(period));
    const int32_t rest = before ? (2 * i + 1) * coarse - size : int32_t(numerator - uint32_t(lo) * uint32_t(period));
    return {lo, rest, 2 * coarse, period, coarse - 1, 1.0f / float(period)};
  }
  // True where the next voxel lies between the next two coarse voxels.
  DGF_HD bool next() {
    rest += step;
    if (rest < period) return false;
    rest -= period;
    ++lo;
    return true;
  }
  DGF_HD int32_t above() const { return lo < last ? lo + 1 : lo; }
  DGF_HD float weight() const { return rest > 0 ? float(rest) * unit : 0.0f; }
  DGF_HD int32_t hi() const { return rest > 0 ? above() : lo; }
  // The weight with which this voxel reads coarse voxel i.
  DGF_HD float weight_of(int32_t i) const { return (lo == i ? 1.0f - weight() : 0.0f) + (hi() == i ? weight() : 0.0f); }
};

// The first output voxel that reads coarse voxel i along an axis: the first with a source above i - 1. In 32 bits, too.
DGF_HD int32_t first_reached(int32_t i, int32_t size, int32_t coarse) {
  const int64_t numerator = int64_t(2 * i - 1) * size - coarse;
  return numerator < 0 ? 0 : int32_t(uint32_t(numerator) / uint32_t(2 * coarse)) + 1;
}

DGF_HD bool finite(float v) { return (v < 0 ? -v : v) <= kLargest; }

DGF_HD float mix(float lo, float hi, float weight) { return lo + weight * (hi - lo); }

// Shift and gain of a sample's image from its least and greatest voxel; constant → 0.
DGF_HD void minmax_affine(float lo, float hi, float* shift, float* gain) {
  const float span = hi - lo;
  const bool varies = span >= kSmallest;
  *shift = varies ? lo : 0.0f;
  *gain = varies ? 1.0f / span : 0.0f;
}

DGF_HD float clip(float v, float lo, float hi) { return v < lo ? lo : v > hi ? hi : v; }  // NaN stays NaN

// Shift and gain of every image where they do not depend on it.
DGF_HD void fixed_affine(int32_t norm, float a, float b, float* shift, float* gain) {
  *shift = norm == kNoImageNorm ? 0.0f : a;
  *gain = norm == kWindow ? 1.0f / (b - a) : norm == kZScore ? 1.0f / b : 1.0f;
}

DGF_HD float normalized(float v, float shift, float gain) { return (v - shift) * gain; }

// A set of values: how many, their mean, Σ (v - mean)².
struct Spread {
  double count, mean, squares;
};

// Chan, Golub & LeVeque 1979: the spread of the union of two sets.
DGF_HD void unite(Spread* into, const Spread& other) {
  if (other.count == 0) return;
  const double total = into->count + other.count, delta = other.mean - into->mean, share = other.count / total;
  into->mean += delta * share;
  into->squares += other.squares + delta * delta * into->count * share;
  into->count = total;
}

// "instance": shift and gain from the spread of a channel's finite voxels.
DGF_HD void instance_affine(const Spread& spread, float eps, float* shift, float* gain) {
  const double variance = spread.count > 0 ? spread.squares / spread.count : 0.0;
  *shift = float(spread.mean);
  *gain = float(1.0 / sqrt((variance > 0 ? variance : 0.0) + double(eps)));
}

// "unit", "standard": the gain of a voxel from Σ (v - shift)² over its channels.
DGF_HD float voxel_gain(int32_t norm, float squares, float channels, float eps) {
  if (norm == kStandard) return 1.0f / sqrtf(squares / channels + eps);
  const float length = sqrtf(squares);
  return 1.0f / (length < eps ? eps : length);  // compared, not clamped: a NaN stays one
}

// Through (v - mean) · gain: v̂ is the normalized value, the means are those of g and of g · v̂ over what was normalized.
DGF_HD float norm_gradient(float g, float normalized_value, float gain, float mean, float mean_product) {
  return gain * (g - mean - normalized_value * mean_product);
}

// "unit", "standard": the means of `norm_gradient` from the sums over a voxel's channels. A norm of eps or less was held there.
DGF_HD void voxel_gradient_means(int32_t norm, float gain, float channels, float eps, float* sum, float* product) {
  const bool held = norm == kUnit && gain >= 1.0f / eps;
  *sum = norm == kStandard ? *sum / channels : 0.0f;
  *product = norm == kStandard ? *product / channels : held ? 0.0f : *product;
}

// To the image: zero where a window clipped.
DGF_HD float image_gradient(float g, float gain, bool window, float v, float lo, float hi) {
  return window && (v < lo || v > hi) ? 0.0f : g * gain;
}

}  // namespace
