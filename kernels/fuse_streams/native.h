// fuse_streams: the arithmetic of one voxel, written once for every native backend, and the C interface.
//
// Shapes: N batch, Ci image channels, Cf feature channels, D H W voxels, d h w coarse voxels.
//   y[n, c]      = scale[n, c] · (x[n, c] - shift) · gain             c < Ci
//   y[n, Ci + c] = scale[n, Ci + c] · Σ over 8 taps of weight · (f[n, c] - shift) · gain
#pragma once

#include "../native.h"

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
  float* grad_features;   // backward: (N, Cf, d, h, w) float32 dense, or null
  FuseStreamsTensor grad_image;  // backward: dense, or data null
  int32_t image_norm;     // ImageNorm
  int32_t feature_norm;   // FeatureNorm
  float norm_a, norm_b;   // window: lo, hi; z-score: mean, standard deviation
  float eps;
  int32_t threads;        // on the CPU
  int32_t zeroed;         // forward: `out` reads as zeros already; backward: bit 0 grad_features, bit 1 grad_image
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

}  // namespace
