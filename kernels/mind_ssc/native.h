// mind_ssc on the CPU: the C interface.
//
// Shapes: N batch, D H W voxels. The image is contiguous, and so is the result.
#pragma once

#include "../native.h"

extern "C" {

struct MindSscArguments {
  int64_t bytes;  // sizeof(MindSscArguments), so that a library of another version refuses
  int64_t batch;
  int64_t size[3];      // D, H, W
  int64_t radius;       // of the box, in voxels
  int64_t dilation;     // distance of the neighbours, in voxels
  const void* image;    // (N, 1, D, H, W)
  void* out;            // (N, 12, D, H, W)
  int32_t image_type;   // Type of kernels/native.h
  int32_t out_type;     // float32, float16 or bfloat16
  int32_t threads;
};
}
