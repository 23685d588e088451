// warp on the CPU: the C interface.
//
// Shapes: N batch, C image channels, L labels, D H W voxels, d h w coarse voxels. All tensors are contiguous.
#pragma once

#include "../native.h"

extern "C" {

struct WarpArguments {
  int64_t bytes;  // sizeof(WarpArguments), so that a library of another version refuses
  int64_t batch, channels, labels;
  int64_t size[3];            // D, H, W; D·H·W < 2³¹ - 64
  int64_t coarse[3];          // d, h, w
  const void* image;          // (N, C, D, H, W)
  void* out;                  // the same
  const void* label;          // (N, L, D, H, W)
  void* label_out;            // the same
  const float* matrix;        // (N, 3, 4): [A|t]
  const float* displacement;  // (N, 3, d, h, w) in voxels, or null
  int32_t type;               // Type of kernels/native.h: float32, float16 or bfloat16
  int32_t label_bytes;        // of an element: 1, 2 or 4
  int32_t border;             // 1: coordinates are clamped; 0: zeros outside
  int32_t threads;
};
}
