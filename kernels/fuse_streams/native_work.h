// fuse_streams on the CPU: how the work is cut, and how a volume is walked.
//
// Blocks depend on sizes and layouts only, never on the number of threads, and what they find is combined in order: the
// threads do not change a bit.
#pragma once

#include "native.h"

namespace {

using Arguments = FuseStreamsArguments;

enum Status { kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3 };

constexpr int64_t kPiece = 1024;             // elements whose sums are taken in float before they are combined in double
constexpr int64_t kBlockElements = 1 << 16;  // of a block of planes, the unit of work
constexpr int64_t kSerial = 1 << 15;         // elements below which threads cost more than they save

int64_t offset_of(const FuseStreamsTensor& t, int64_t n, int64_t c, int64_t z, int64_t y) {
  return n * t.strides[0] + c * t.strides[1] + z * t.strides[2] + y * t.strides[3];
}

int64_t element_size(int32_t type) { return type == kFloat32 ? 4 : type == kUInt8 ? 1 : 2; }

template <class T>
T* at(const FuseStreamsTensor& t, int64_t offset) {
  return static_cast<T*>(t.data) + offset;
}

float scale_of(const Arguments& a, int64_t n, int64_t c) { return a.scale[n * (a.image_channels + a.feature_channels) + c]; }

bool any_kept(const Arguments& a, int64_t n, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; ++c)
    if (scale_of(a, n, c) != 0.0f) return true;
  return false;
}

bool same_grid(const Arguments& a) {
  return a.size[0] == a.coarse[0] && a.size[1] == a.coarse[1] && a.size[2] == a.coarse[2];
}

// Whether each coarse voxel has statistics of its own, over its channels.
bool per_voxel(const Arguments& a) { return a.feature_norm == kUnit || a.feature_norm == kStandard; }

int team(const Arguments& a, int64_t elements) { return int(least(a.threads, 1 + elements / kSerial)); }

// A channel's planes in blocks of about kBlockElements.
struct Blocks {
  int64_t depth, planes, count;
  Blocks(int64_t depth_, int64_t plane) : depth(depth_) {
    planes = plane < kBlockElements ? kBlockElements / plane : 1;
    count = (depth + planes - 1) / planes;
  }
  int64_t begin(int64_t block) const { return block * planes; }
  int64_t end(int64_t block) const { return least(depth, (block + 1) * planes); }
};

// The elements of a plane that a block brings into the cache: those of all channels where these lie together.
int64_t plane_of(const FuseStreamsTensor& t, int64_t channels, int64_t plane) {
  return channels && t.strides[4] != 1 ? plane * channels : plane;
}

// The rows of a plane as runs at an even stride: one where its rows follow each other in every tensor concerned.
struct Runs {
  int64_t count, length;
  Runs(int64_t rows, int64_t width, bool joined) : count(joined ? 1 : rows), length(joined ? rows * width : width) {}
};
bool joined(const FuseStreamsTensor& t, int64_t width) { return t.strides[3] == width * t.strides[4]; }

// The channels of the draw that are kept, in order: of the image, then of the features.
struct Channel {
  int64_t n, c;
};
struct Kept {
  Scratch<Channel> channels;
  int64_t images = 0, count = 0;
  explicit Kept(const Arguments& a) : channels(a.batch * (a.image_channels + a.feature_channels)) {
    if (!channels.data) return;
    add(a, 0, a.image_channels);
    images = count;
    add(a, a.image_channels, a.image_channels + a.feature_channels);
  }
  void add(const Arguments& a, int64_t from, int64_t to) {
    for (int64_t n = 0; n < a.batch; ++n)
      for (int64_t c = from; c < to; ++c)
        if (scale_of(a, n, c) != 0.0f) channels.data[count++] = {n, c};
  }
};

// One task for each block of planes of each of some kept channels. Channel by channel where these lie apart in memory; where
// the channels of a voxel lie together, block by block, so that a block comes from memory once for all of a sample's channels.
struct Tasks {
  const Kept& kept;
  int64_t from, to, blocks;
  bool together;
  struct Task {
    int64_t index, block;  // of the channel among [from, to), and of its block
  };
  int64_t count() const { return (to - from) * blocks; }
  int64_t slot(const Task& t) const { return t.index * blocks + t.block; }
  const Channel& channel(const Task& t) const { return kept.channels.data[from + t.index]; }
  Task at(int64_t i) const {
    if (!together) return {i / blocks, i % blocks};
    int64_t begin = from + i / blocks, end = begin;  // the channels of the same sample
    const int64_t n = kept.channels.data[begin].n;
    while (begin > from && kept.channels.data[begin - 1].n == n) --begin;
    while (end < to && kept.channels.data[end].n == n) ++end;
    const int64_t rest = i - (begin - from) * blocks;
    return {begin - from + rest % (end - begin), rest / (end - begin)};
  }
};

// n elements as float: where they lie, if they are float and dense, else converted into `buffer`.
const float* floats(const FuseStreamsTensor& t, LoadRow load, int64_t offset, int64_t n, float* buffer) {
  if (t.type == kFloat32 && t.strides[4] == 1) return at<const float>(t, offset);
  load(t.data, offset, t.strides[4], n, buffer);
  return buffer;
}

}  // namespace
