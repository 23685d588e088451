// fuse_streams on a GPU.
//
// Forward, two launches. `statistics` reads what a statistic is taken of and leaves one partial result a block in the
// workspace. The output pass (`fuse_rows` for NCDHW, `fuse_voxels` for channels-last) begins each block by combining the
// partial results of its channels, at most kChunks of them, in a fixed order: every block comes to the same bits, and the
// first block of a channel also writes them down for the backward pass. So no block waits for another: a cooperative
// launch would cap the grid at what is resident, and a "last block done" counter would need a launch to be zeroed.
// Where nothing is to be measured the output pass is the only launch.
//
// Backward: `image_gradients`; `gather_gradients`, in which every coarse voxel adds up the output voxels that read it (no
// atomics, a fixed order), then, in place, the gradient of the normalization (`instance_gradients`, `voxel_gradients`).
//
// How many blocks share a statistic depends on sizes alone, so results are the same bits on every GPU of an architecture.
#include "native.h"

#include "../native_cuda.h"

namespace {

using Arguments = FuseStreamsArguments;

constexpr int kBatch = 16;    // values of a thread whose spread is taken in float at once
constexpr int kFew = 4;       // the same where they do not come in packets
constexpr int kChunks = 128;  // blocks that share a channel's statistics, at most
constexpr int kLanes = kThreads < 32 ? kThreads : 32;  // threads that combine the partial results of a channel
constexpr int kResident = 4;  // blocks that fit a multiprocessor at once: at most 64 registers a thread
constexpr int kRounds = 16;   // times that a block of an output pass goes round, at most
constexpr int64_t kBlocks = 4096;  // of an output pass, before its blocks go round more than once
constexpr int kTileBytes = 40 * 1024;  // of shared memory: 48 KiB less what blocks keep in static arrays
constexpr int64_t kMostBlocks = 2147483647;
// Voxels of a channel are counted in 32 bits, whatever the strides: a GPU divides 64 bits in software. So are positions
// along an axis, 2 · size · coarse of them. native.py refuses what passes these bounds.
constexpr int64_t kMostVoxels = kMostBlocks - (1 << 20);
constexpr int64_t kLongestAxis = 1 << 15;

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The blocks that share the statistics of `count` voxels, of `lanes` channels abreast.
int chunks_of(int64_t count, int64_t lanes) {
  return int(larger(1, smaller(kChunks, divide_up(count, int64_t(kBatch) * (kThreads / lanes)))));
}

// How a tensor lies: whether voxel v of a channel is at v · strides[4], whether packets of it may be read.
struct Lie {
  bool flat, packets;
};

struct Extremes {
  float lo, hi;
};

template <int N>
struct Count {  // a number that the compiler knows, as an argument
  static constexpr int value = N;
};

struct Sums {  // Σ g, Σ g · f̂
  double value, product;
};

// What the host works out once for the kernels of a call.
struct Plan {
  int32_t size[3], coarse[3];  // as in the arguments
  int32_t voxels, coarse_voxels, image_channels, feature_channels, out_channels;
  Lie image, features, out;  // backward: `out` is the incoming gradient
  bool image_whole;          // all channels of a sample's image in one dense piece
  bool same;                 // the features are on the image's grid
  bool out_packets;          // channels-last: tiles may be stored in packets
  int32_t image_chunks, feature_chunks, feature_lanes;
  int64_t image_blocks, statistic_blocks;  // of `statistics`: the image's first
  Extremes* image_partial;   // (N, image_chunks)
  Spread* feature_partial;   // (N, Cf, feature_chunks)
  Sums* gradient_partial;    // (N, Cf, feature_chunks)
  int32_t ranges, range;     // an output pass over rows: blocks a channel, packets a block
  int32_t tile, rounds;      // an output pass over voxels: voxels a tile, tiles a block
};

// ---- what every kernel uses ----------------------------------------------------------------------------------------

struct Voxel {
  int32_t z, y, x;
};

__device__ inline Voxel unravel(int32_t v, const int32_t* size) {
  const uint32_t row = uint32_t(v) / uint32_t(size[2]), z = row / uint32_t(size[1]);
  return {int32_t(z), int32_t(row - z * uint32_t(size[1])), int32_t(uint32_t(v) - row * uint32_t(size[2]))};
}

// Offset of voxel v within its channel.
__device__ inline int64_t offset_of(const FuseStreamsTensor& t, const Lie& lie, int32_t v, const int32_t* size) {
  if (lie.flat) return v * t.strides[4];
  const Voxel at = unravel(v, size);
  return at.z * t.strides[2] + at.y * t.strides[3] + at.x * t.strides[4];
}

__device__ inline int64_t channel_offset(const FuseStreamsTensor& t, int32_t n, int32_t c) {
  return n * t.strides[0] + c * t.strides[1];
}

__device__ inline float scale_of(const Arguments& a, const Plan& p, int32_t n, int32_t c) {
  return a.scale[int64_t(n) * (p.image_channels + p.feature_channels) + c];
}

__device__ inline bool any_kept(const Arguments& a, const Plan& p, int32_t n, int32_t from, int32_t to) {
  bool kept = false;
  for (int32_t c = from; c < to; ++c) kept = kept || scale_of(a, p, n, c) != 0.0f;
  return kept;
}

__device__ inline void join(Spread* into, const Spread& other) { unite(into, other); }
__device__ inline void join(Extremes* into, const Extremes& other) {
  if (other.lo < into->lo) into->lo = other.lo;
  if (other.hi > into->hi) into->hi = other.hi;
}
__device__ inline void join(Sums* into, const Sums& other) {
  into->value += other.value;
  into->product += other.product;
}

// Joins held[i], held[i + stride], … (`count` of them) into held[i - lane · stride]: a tree, the same for every run.
// Threads without a share pass a lane that is not below `count`. All threads of the block must come.
template <class T>
__device__ inline void join_across(T* held, int i, int lane, int count, int stride) {
  int step = 1;
  while (step < count) step *= 2;
  for (step /= 2; step > 0; step /= 2) {
    __syncthreads();
    if (lane < step && lane + step < count) join(held + i, held[i + step * stride]);
  }
  __syncthreads();
}

// The partial results of one channel, combined by kLanes threads; `held` of the first of them has the result. A block that
// comes again with the same `held` must have read no other thread's.
template <class T>
__device__ inline void join_partial(T* held, const T* partial, int count, T empty) {
  const int lane = int(threadIdx.x) % kLanes;
  T result = empty;
  if (partial)
    for (int k = lane; k < count; k += kLanes) join(&result, partial[k]);
  held[threadIdx.x] = result;
  join_across(held, int(threadIdx.x), lane, kLanes, 1);
}

__device__ inline Extremes no_extremes() { return {HUGE_VALF, -HUGE_VALF}; }

// ---- statistics ----------------------------------------------------------------------------------------------------

// Values of a thread, 128 bits at a time; what lies beyond `count` reads as NaN, which no statistic counts.
template <class T>
__device__ inline void load_packets(const T* base, int32_t count, int32_t batch, float* values) {
  constexpr int kEach = 16 / sizeof(T), kPackets = kBatch / kEach;
  Packet<T, kEach> packets[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    const int32_t at = ((batch * kPackets + k) * kThreads + int32_t(threadIdx.x)) * kEach;
    if (at < count) packets[k] = load_packet<kEach>(base + at);
  }
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    const int32_t at = ((batch * kPackets + k) * kThreads + int32_t(threadIdx.x)) * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[k * kEach + i] = at < count ? decode(packets[k].values[i]) : NAN;
  }
}

// Visits this thread's values of a channel, kBatch or kFew at a time, for the given chunk of all of them. Threads are dealt
// to `lanes` channels by turns, where channels are neighbours in memory; the caller has moved `base` to the thread's own.
template <class T, class Visit>
__device__ inline void each_batch(const FuseStreamsTensor& t, Lie lie, const int32_t* size, const T* base, int32_t count,
                                  int chunk, int chunks, int lanes, Visit visit) {
  const int abreast = kThreads / lanes, lane = int(threadIdx.x) / lanes, step = kBatch * abreast;
  if (lane >= abreast) return;
  for (int32_t start = chunk * step; start < count; start += chunks * step) {
    if (lie.packets && lanes == 1) {
      float values[kBatch];
      load_packets(base, count, start / step, values);
      visit(values, Count<kBatch>());
      continue;
    }
    // Fewer at a time, for their addresses take registers.
#pragma unroll 1
    for (int32_t v = start + lane; v < smaller(count, start + step); v += kFew * abreast) {
      float values[kFew];
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
        const int32_t at = v + k * abreast;
        values[k] = at < count ? decode(base[offset_of(t, lie, at, size)]) : NAN;
      }
      visit(values, Count<kFew>());
    }
  }
}

// A running spread of the finite values. The mean of each batch is taken twice, the second time around the first, and
// batches are united as in `unite`: a large offset costs no digits, though all of it is float.
struct RunningSpread {
  float count = 0, mean = 0, squares = 0;
  template <int COUNT>
  __device__ void add(const float* values) {
    float sum = 0, known = 0;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      sum += finite(values[k]) ? values[k] : 0.0f;
      known += finite(values[k]) ? 1.0f : 0.0f;
    }
    if (known == 0) return;
    const float centre = sum / known;
    float deviations = 0, squared = 0;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const float d = finite(values[k]) ? values[k] - centre : 0.0f;
      deviations += d;
      squared += d * d;
    }
    const float slip = deviations / known, total = count + known, share = known / total;
    const float delta = centre + slip - mean;
    squares += squared - slip * deviations + delta * delta * count * share;
    mean += delta * share;
    count = total;
  }
};

__device__ inline void image_extremes(const Arguments& a, const Plan& p, int32_t block) {
  __shared__ Extremes held[kThreads];
  const int chunk = block % p.image_chunks, n = block / p.image_chunks;
  Extremes extremes = no_extremes();
  // All channels or none: the least and the greatest voxel are those of all channels together.
  if (any_kept(a, p, n, 0, p.image_channels)) {
    const int32_t pieces = p.image_whole ? 1 : p.image_channels, count = p.image_whole ? p.voxels * p.image_channels : p.voxels;
    Lie lie = p.image;
    FuseStreamsTensor t = a.image;
    if (p.image_whole) lie.flat = true, t.strides[4] = 1;
    with_type(a.image.type, [&](auto kind) {
      using T = decltype(kind);
      for (int32_t c = 0; c < pieces; ++c)
        each_batch(t, lie, p.size, static_cast<const T*>(t.data) + channel_offset(t, n, c), count, chunk, p.image_chunks, 1,
                   [&](const float* values, auto length) {
#pragma unroll
                     for (int k = 0; k < length.value; ++k)
                       if (finite(values[k])) join(&extremes, Extremes{values[k], values[k]});
                   });
    });
  }
  held[threadIdx.x] = extremes;
  join_across(held, int(threadIdx.x), int(threadIdx.x), kThreads, 1);
  if (threadIdx.x == 0) p.image_partial[block] = held[0];
}

__device__ inline void feature_spread(const Arguments& a, const Plan& p, int32_t block) {
  __shared__ Spread held[kThreads];
  const int lanes = p.feature_lanes, abreast = kThreads / lanes, lane = int(threadIdx.x) / lanes;
  const int chunk = block % p.feature_chunks;
  const int group = block / p.feature_chunks;  // a channel of a sample, or where lanes are channels a sample
  const int n = lanes == 1 ? group / p.feature_channels : group;
  const int c = lanes == 1 ? group % p.feature_channels : int(threadIdx.x) % lanes;
  const bool kept = lane < abreast && scale_of(a, p, n, p.image_channels + c) != 0.0f;
  RunningSpread running;
  if (kept)
    with_float_type(a.features.type, [&](auto kind) {
      using T = decltype(kind);
      each_batch(a.features, p.features, p.coarse, static_cast<const T*>(a.features.data) + channel_offset(a.features, n, c),
                 p.coarse_voxels, chunk, p.feature_chunks, lanes,
                 [&](const float* values, auto length) { running.add<length.value>(values); });
    });
  held[threadIdx.x] = {running.count, running.mean, running.squares};
  join_across(held, int(threadIdx.x), lane, abreast, lanes);
  if (lane == 0) p.feature_partial[(int64_t(n) * p.feature_channels + c) * p.feature_chunks + chunk] = held[threadIdx.x];
}

// "unit", "standard": a thread a coarse voxel.
__device__ inline void voxel_statistics(const Arguments& a, const Plan& p, int32_t block) {
  const int32_t voxels = p.coarse_voxels, blocks = (voxels + kThreads - 1) / kThreads;
  const int32_t n = block / blocks, v = block % blocks * kThreads + int32_t(threadIdx.x);
  if (v >= voxels) return;
  float shift = 0.0f, gain = 0.0f;
  if (any_kept(a, p, n, p.image_channels, p.image_channels + p.feature_channels))
    with_float_type(a.features.type, [&](auto kind) {
      using T = decltype(kind);
      const T* at = static_cast<const T*>(a.features.data) + channel_offset(a.features, n, 0) +
                    offset_of(a.features, p.features, v, p.coarse);
      const int64_t step = a.features.strides[1];
      const float channels = float(p.feature_channels);
      if (a.feature_norm == kStandard) {
        for (int32_t c = 0; c < p.feature_channels; ++c) shift += decode(at[c * step]);
        shift /= channels;
      }
      float squares = 0.0f;
      for (int32_t c = 0; c < p.feature_channels; ++c) {
        const float d = decode(at[c * step]) - shift;
        squares += d * d;
      }
      gain = voxel_gain(a.feature_norm, squares, channels, a.eps);
    });
  float* stats = a.feature_stats + int64_t(2) * n * voxels + v;
  stats[0] = shift;
  stats[voxels] = gain;
}

__global__ void __launch_bounds__(kThreads, kResident) statistics(const Arguments a, const Plan p) {
  const int32_t block = int32_t(blockIdx.x);
  if (block < p.image_blocks)
    image_extremes(a, p, block);
  else if (a.feature_norm == kInstance)
    feature_spread(a, p, block - int32_t(p.image_blocks));
  else
    voxel_statistics(a, p, block - int32_t(p.image_blocks));
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct Affine {
  float shift, gain;
};

// Of a sample's image. All threads of the block must come.
__device__ inline Affine image_affine(const Arguments& a, const Plan& p, int32_t n, Extremes* held) {
  Affine result;
  if (a.image_norm != kMinMax) {
    fixed_affine(a.image_norm, a.norm_a, a.norm_b, &result.shift, &result.gain);
    return result;
  }
  join_partial(held, p.image_partial + int64_t(n) * p.image_chunks, p.image_chunks, no_extremes());
  minmax_affine(held[0].lo, held[0].hi, &result.shift, &result.gain);
  return result;
}

// COUNT voxels of a channel on the image's own grid, from voxel v on: put(i, value) takes each in turn.
template <class T, int COUNT, class Put>
__device__ inline void read_voxels(const FuseStreamsTensor& t, const Lie& lie, const int32_t* size, const T* channel, int32_t v,
                                   Put put) {
  if (lie.packets) {
    const Packet<T, COUNT> packet = load_packet<COUNT>(channel + v);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) put(i, decode(packet.values[i]));
    return;
  }
  const T* at = channel + offset_of(t, lie, v, size);  // packets do not leave their row
  for (int i = 0; i < COUNT; ++i) put(i, decode(at[i * t.strides[4]]));
}

// The same from a coarser grid. A column is the four coarse voxels above and below each other at one x, blended along z
// and y; neighbours along x share theirs.
template <class T, int COUNT, class Put>
__device__ inline void read_interpolated(const Arguments& a, const Plan& p, const T* channel, int32_t n, int32_t v, Put put) {
  const Voxel at = unravel(v, p.size);
  const TapWalk z = TapWalk::from(at.z, p.size[0], p.coarse[0]), y = TapWalk::from(at.y, p.size[1], p.coarse[1]);
  TapWalk x = TapWalk::from(at.x, p.size[2], p.coarse[2]);
  const int64_t* strides = a.features.strides;
  const float wz = z.weight(), wy = y.weight();
  const bool voxel_norm = a.feature_norm == kUnit || a.feature_norm == kStandard;
  const float* stats = a.feature_stats + int64_t(2) * n * p.coarse_voxels;
  const T* front = channel + z.lo * strides[2] + y.lo * strides[3];
  const int64_t down = (y.hi() - y.lo) * strides[3], back = (z.hi() - z.lo) * strides[2];

  const auto corner = [&](int64_t row, int32_t cz, int32_t cy, int32_t cx) {
    const float value = decode(front[row + cx * strides[4]]);
    if (!voxel_norm) return value;
    const float* of = stats + (cz * p.coarse[1] + cy) * p.coarse[2] + cx;
    return normalized(value, of[0], of[p.coarse_voxels]);
  };
  const auto column = [&](int32_t cx) {
    float low = corner(0, z.lo, y.lo, cx), high = corner(down, z.lo, y.hi(), cx);
    if (z.rest > 0) {
      low = mix(low, corner(back, z.hi(), y.lo, cx), wz);
      high = mix(high, corner(back + down, z.hi(), y.hi(), cx), wz);
    }
    return y.rest > 0 ? mix(low, high, wy) : low;
  };

  float low = column(x.lo), high = column(x.above());
#pragma unroll 1  // unrolled, it takes twice the registers
  for (int i = 0; i < COUNT; ++i) {
    put(i, x.rest > 0 ? mix(low, high, x.weight()) : low);  // what has no weight does not count, NaN included
    if (i + 1 < COUNT && x.next()) {
      low = high;
      high = column(x.above());
    }
  }
}

// COUNT voxels of output channel c < Ci + Cf, whose elements are T, before its shift and gain.
template <class T, int COUNT, class Put>
__device__ inline void read_channel(const Arguments& a, const Plan& p, int32_t n, int32_t c, int32_t v, Put put) {
  if (c < p.image_channels) {
    const T* channel = static_cast<const T*>(a.image.data) + channel_offset(a.image, n, c);
    const bool window = a.image_norm == kWindow;
    read_voxels<T, COUNT>(a.image, p.image, p.size, channel, v,
                          [&](int i, float value) { put(i, window ? clip(value, a.norm_a, a.norm_b) : value); });
  } else if constexpr (kIsFloat<T>) {
    const T* channel = static_cast<const T*>(a.features.data) + channel_offset(a.features, n, c - p.image_channels);
    if (!p.same) return read_interpolated<T, COUNT>(a, p, channel, n, v, put);
    const bool voxel_norm = a.feature_norm == kUnit || a.feature_norm == kStandard;
    const float* stats = a.feature_stats + int64_t(2) * n * p.voxels + v;
    read_voxels<T, COUNT>(a.features, p.features, p.size, channel, v, [&](int i, float value) {
      put(i, voxel_norm ? normalized(value, stats[i], stats[p.voxels + i]) : value);
    });
  }
}

// A packet that is filled from its end, so that the loop that fills it need not be unrolled.
template <class T, int COUNT>
struct Filling {
  Packet<T, COUNT> packet{};
  __device__ void put(float value) {
#pragma unroll
    for (int i = 0; i + 1 < COUNT; ++i) packet.values[i] = packet.values[i + 1];
    encode(value, packet.values + COUNT - 1);
  }
};

template <class Out, int COUNT>
__device__ inline void store_values(const float* values, Affine affine, Out* to) {
  Packet<Out, COUNT> packet;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) encode(normalized(values[i], affine.shift, affine.gain), packet.values + i);
  store_packet<COUNT>(to, packet);
}

// The output pass into NCDHW: a block a range of one channel. COUNT voxels a packet; COUNT = 1 takes any layout.
template <class Out, int COUNT>
__global__ void __launch_bounds__(kThreads, kResident) fuse_rows(const Arguments a, const Plan p) {
  __shared__ Spread spreads[kThreads];
  __shared__ Extremes extremes[kThreads];
  const int32_t block = int32_t(blockIdx.x), range = block % p.ranges, c = block / p.ranges % p.out_channels;
  const int32_t n = block / p.ranges / p.out_channels, streams = p.image_channels + p.feature_channels;
  const float scale = c < streams ? scale_of(a, p, n, c) : 0.0f;
  const bool writes = range == 0;  // this block writes the statistics of its channel
  Affine affine{0.0f, 1.0f};
  if (c < p.image_channels && (scale != 0.0f || (writes && c == 0))) {
    affine = image_affine(a, p, n, extremes);
    if (writes && c == 0 && threadIdx.x == 0) a.image_stats[2 * n] = affine.shift, a.image_stats[2 * n + 1] = affine.gain;
  } else if (c >= p.image_channels && c < streams && a.feature_norm == kInstance && (scale != 0.0f || writes)) {
    const int64_t channel = int64_t(n) * p.feature_channels + c - p.image_channels;
    join_partial(spreads, p.feature_partial + channel * p.feature_chunks, p.feature_chunks, Spread{0, 0, 0});
    instance_affine(spreads[0], a.eps, &affine.shift, &affine.gain);
    if (writes && threadIdx.x == 0) a.feature_stats[2 * channel] = affine.shift, a.feature_stats[2 * channel + 1] = affine.gain;
  }
  affine.gain *= scale;

  const int32_t end = int32_t(smaller(p.voxels / COUNT, (int64_t(range) + 1) * p.range));
  const int64_t stride = COUNT > 1 ? 1 : a.out.strides[4];
  Out* __restrict__ out = static_cast<Out*>(a.out.data) + channel_offset(a.out, n, c);
  int32_t i = range * p.range + int32_t(threadIdx.x);
  if (scale == 0.0f) {
    const Packet<Out, COUNT> zeros{};
    for (; i < end; i += kThreads) store_packet<COUNT>(out + i * COUNT * stride, zeros);
    return;
  }
  const auto pass = [&](auto kind) {
    using T = decltype(kind);
    const bool image = c < p.image_channels, voxel_norm = a.feature_norm == kUnit || a.feature_norm == kStandard;
    if (image ? p.image.packets && a.image_norm != kWindow : p.same && p.features.packets && !voxel_norm) {
      // Nothing but packets in and packets out: several are under way at a time.
      constexpr int kDepth = sizeof(T) * COUNT > 16 ? 2 : 4;
      const void* data = image ? a.image.data : a.features.data;
      const T* __restrict__ in = static_cast<const T*>(data) + (image ? channel_offset(a.image, n, c)
                                                                      : channel_offset(a.features, n, c - p.image_channels));
      for (; i + (kDepth - 1) * kThreads < end; i += kDepth * kThreads) {
        Packet<T, COUNT> packets[kDepth];
#pragma unroll
        for (int k = 0; k < kDepth; ++k) packets[k] = load_packet<COUNT>(in + (i + k * kThreads) * COUNT);
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
          float values[COUNT];
#pragma unroll
          for (int j = 0; j < COUNT; ++j) values[j] = decode(packets[k].values[j]);
          store_values<Out, COUNT>(values, affine, out + (i + k * kThreads) * COUNT * stride);
        }
      }
    }
    for (; i < end; i += kThreads) {
      Filling<Out, COUNT> filling;
      read_channel<T, COUNT>(a, p, n, c, i * COUNT,
                             [&](int, float value) { filling.put(normalized(value, affine.shift, affine.gain)); });
      store_packet<COUNT>(out + i * COUNT * stride, filling.packet);
    }
  };
  with_type(c < p.image_channels ? a.image.type : a.features.type, pass);
}

// Shared memory of `fuse_voxels`: shift and gain of each channel, the channels that are kept, then a tile of voxels,
// channel by channel. Rows of a tile are an odd number of 32-bit words apart: those who read a voxel's channels, and those
// who read its neighbour's, then fall on different banks.
__host__ __device__ inline int64_t row_pitch(int64_t tile, int64_t element_bytes) {
  return tile + (element_bytes < 4 ? 4 / element_bytes : 1);
}
int64_t table_bytes(int64_t streams) { return divide_up(streams * 12, 16) * 16; }
int64_t tile_bytes(int64_t channels, int64_t tile, int64_t element_bytes) {
  return channels * row_pitch(tile, element_bytes) * element_bytes;
}

// The output pass into channels-last: a block a run of tiles of one sample, all their channels. What is kept is computed
// with threads along x, as the inputs lie, and stored with threads along the output, which a tile covers in one piece.
template <class Out, int COUNT>
__global__ void __launch_bounds__(kThreads, kResident) fuse_voxels(const Arguments a, const Plan p) {
  __shared__ Spread spreads[kThreads];
  __shared__ Extremes extremes[kThreads];
  __shared__ int kept_count;
  DGF_DYNAMIC_SHARED(memory);
  const int streams = p.image_channels + p.feature_channels, channels = p.out_channels;
  const int thread = int(threadIdx.x), pitch = int(row_pitch(p.tile, sizeof(Out)));
  Affine* affines = reinterpret_cast<Affine*>(memory);
  int* listed = reinterpret_cast<int*>(affines + streams);  // channels, those that are kept first
  Out* tile = reinterpret_cast<Out*>(memory + (int64_t(streams) * 12 + 15) / 16 * 16);

  const int32_t tiles = (p.voxels + p.tile - 1) / p.tile, runs = (tiles + p.rounds - 1) / p.rounds;
  const int32_t run = int32_t(blockIdx.x) % runs, n = int32_t(blockIdx.x) / runs;
  const bool writes = run == 0;  // this block writes the statistics of its sample
  if (thread == 0) {
    int count = 0;
    for (int c = 0; c < streams; ++c)
      if (scale_of(a, p, n, c) != 0.0f) listed[count++] = c;
    kept_count = count;
    for (int c = 0; c < streams && writes; ++c)  // the statistics of the others are written, too
      if (scale_of(a, p, n, c) == 0.0f) listed[count++] = c;
  }
  __syncthreads();
  const int kept = kept_count, known = writes ? streams : kept;
  const bool any_image = writes || (kept > 0 && listed[0] < p.image_channels);
  const Affine image = any_image ? image_affine(a, p, n, extremes) : Affine{0.0f, 0.0f};
  if (writes && thread == 0) a.image_stats[2 * n] = image.shift, a.image_stats[2 * n + 1] = image.gain;
  for (int first = 0; first < known; first += kThreads / kLanes) {
    const int slot = first + thread / kLanes, c = slot < known ? listed[slot] : -1;
    const int64_t channel = int64_t(n) * p.feature_channels + c - p.image_channels;
    const bool instance = a.feature_norm == kInstance && c >= p.image_channels;
    if (a.feature_norm == kInstance)
      join_partial(spreads, instance ? p.feature_partial + channel * p.feature_chunks : nullptr, p.feature_chunks,
                   Spread{0, 0, 0});
    if (thread % kLanes == 0 && c >= 0) {
      Affine affine = c < p.image_channels ? image : Affine{0.0f, 1.0f};
      if (instance) {
        instance_affine(spreads[thread], a.eps, &affine.shift, &affine.gain);
        if (writes) a.feature_stats[2 * channel] = affine.shift, a.feature_stats[2 * channel + 1] = affine.gain;
      }
      affine.gain *= scale_of(a, p, n, c);
      affines[slot] = affine;
    }
  }

  const Out zero{};  // what is dropped stays so
  for (int i = thread; i < channels * pitch; i += kThreads) tile[i] = zero;
  const int packets = p.tile / COUNT;  // of a row of the tile
  Out* __restrict__ out = static_cast<Out*>(a.out.data) + n * a.out.strides[0];
  for (int32_t round = run * p.rounds; round < smaller(tiles, (run + 1) * p.rounds); ++round) {
    const int32_t start = round * p.tile, inside = int32_t(smaller(p.tile, p.voxels - start));
    __syncthreads();
    for (int item = thread; item < kept * packets; item += kThreads) {
      const int slot = item / packets, c = listed[slot], v = item % packets * COUNT;
      const Affine affine = affines[slot];
      if (v >= inside) continue;
      Out* row = tile + c * pitch + v;
      with_type(c < p.image_channels ? a.image.type : a.features.type, [&](auto kind) {
        read_channel<decltype(kind), COUNT>(a, p, n, c, start + v, [&](int i, float value) {
          encode(normalized(value, affine.shift, affine.gain), row + i);
        });
      });
    }
    __syncthreads();
    constexpr int kEach = 16 / sizeof(Out);
    Out* to = out + int64_t(start) * channels;
    const int elements = inside * channels, whole = p.out_packets ? elements - elements % kEach : 0;
    for (int e = thread * kEach; e < whole; e += kThreads * kEach) {
      int v = e / channels, c = e - v * channels;
      Packet<Out, kEach> packet;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        packet.values[i] = tile[c * pitch + v];
        if (++c == channels) c = 0, ++v;
      }
      store_packet<kEach>(to + e, packet);
    }
    for (int e = whole + thread; e < elements; e += kThreads) to[e] = tile[e % channels * pitch + e / channels];
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// scale · gain · gradient; zero where a window clipped. A block a range of one channel.
template <class Out, int COUNT>
__global__ void __launch_bounds__(kThreads, kResident) image_gradients(const Arguments a, const Plan p) {
  const int32_t block = int32_t(blockIdx.x), range = block % p.ranges, c = block / p.ranges % p.image_channels;
  const int32_t n = block / p.ranges / p.image_channels;
  const float scale = scale_of(a, p, n, c), gain = a.image_stats[2 * n + 1] * scale;
  const int32_t end = int32_t(smaller(p.voxels / COUNT, (int64_t(range) + 1) * p.range));
  const bool window = a.image_norm == kWindow;
  Out* __restrict__ out = static_cast<Out*>(a.grad_image.data) + channel_offset(a.grad_image, n, c);
  with_float_type(a.out.type, [&](auto kind) {
    using T = decltype(kind);
    const T* grads = static_cast<const T*>(a.out.data) + channel_offset(a.out, n, c);
    for (int32_t i = range * p.range + int32_t(threadIdx.x); i < end; i += kThreads) {
      Filling<Out, COUNT> filling;
      if (scale != 0.0f) {
        const int64_t first = window ? channel_offset(a.image, n, c) + offset_of(a.image, p.image, i * COUNT, p.size) : 0;
        read_voxels<T, COUNT>(a.out, p.out, p.size, grads, i * COUNT, [&](int k, float grad) {
          const float voxel = window ? load_any(a.image.type, a.image.data, first + k * a.image.strides[4]) : 0.0f;
          filling.put(image_gradient(grad, gain, window, voxel, a.norm_a, a.norm_b));
        });
      }
      store_packet<COUNT>(out + i * COUNT, filling.packet);
    }
  });
}

__device__ inline float normalized_feature(const Arguments& a, const Plan& p, int32_t n, int32_t c, int32_t v, float shift,
                                           float gain) {
  const int64_t at = channel_offset(a.features, n, c) + offset_of(a.features, p.features, v, p.coarse);
  return normalized(load_any(a.features.type, a.features.data, at), shift, gain);
}

// grad_features[n, c] = scale · the transpose of the interpolation, and for "instance" the sums that its gradient needs.
// A block a chunk of one channel, a thread a coarse voxel.
__global__ void __launch_bounds__(kThreads, kResident) gather_gradients(const Arguments a, const Plan p) {
  __shared__ Sums held[kThreads];
  const int32_t channel = int32_t(blockIdx.x) / p.feature_chunks;
  const int32_t n = channel / p.feature_channels, c = channel % p.feature_channels;
  const int32_t chunk = int32_t(blockIdx.x) % p.feature_chunks, voxels = p.coarse_voxels, step = p.feature_chunks * kThreads;
  const float scale = scale_of(a, p, n, p.image_channels + c);
  const bool instance = a.feature_norm == kInstance;
  const float shift = instance ? a.feature_stats[2 * channel] : 0.0f, gain = instance ? a.feature_stats[2 * channel + 1] : 0.0f;
  float* out = static_cast<float*>(a.grad_features.data) + int64_t(channel) * voxels;
  float sum = 0.0f, product = 0.0f;
  with_float_type(a.out.type, [&](auto kind) {
    using T = decltype(kind);
    const T* grads = static_cast<const T*>(a.out.data) + channel_offset(a.out, n, p.image_channels + c);
    const int64_t* strides = a.out.strides;
    for (int32_t v = chunk * kThreads + int32_t(threadIdx.x); v < voxels; v += step) {
      float total = 0.0f;
      if (scale != 0.0f && p.same) {
        total = decode(grads[offset_of(a.out, p.out, v, p.size)]);
      } else if (scale != 0.0f) {
        const Voxel to = unravel(v, p.coarse);
        const int32_t z0 = first_reached(to.z, p.size[0], p.coarse[0]), y0 = first_reached(to.y, p.size[1], p.coarse[1]);
        const int32_t x0 = first_reached(to.x, p.size[2], p.coarse[2]);
        const TapWalk first_y = TapWalk::from(y0, p.size[1], p.coarse[1]), first_x = TapWalk::from(x0, p.size[2], p.coarse[2]);
        TapWalk wz = TapWalk::from(z0, p.size[0], p.coarse[0]);
        for (int32_t z = z0; z < p.size[0] && wz.lo <= to.z; ++z, wz.next()) {
          TapWalk wy = first_y;
          float plane = 0.0f;
          for (int32_t y = y0; y < p.size[1] && wy.lo <= to.y; ++y, wy.next()) {
            TapWalk wx = first_x;
            float line = 0.0f;
            const T* row = grads + z * strides[2] + y * strides[3];
            for (int32_t x = x0; x < p.size[2] && wx.lo <= to.x; ++x, wx.next())
              line += wx.weight_of(to.x) * decode(row[x * strides[4]]);
            plane += wy.weight_of(to.y) * line;
          }
          total += wz.weight_of(to.z) * plane;
        }
      }
      total *= scale;
      out[v] = total;
      if (instance && scale != 0.0f) {
        sum += total;
        product += total * normalized_feature(a, p, n, c, v, shift, gain);
      }
    }
  });
  if (!instance) return;
  held[threadIdx.x] = {sum, product};
  join_across(held, int(threadIdx.x), int(threadIdx.x), kThreads, 1);
  if (threadIdx.x == 0) p.gradient_partial[blockIdx.x] = held[0];
}

// Through (f - mean) · gain over the voxels of each channel, in place. A block a chunk of one channel.
__global__ void __launch_bounds__(kThreads, kResident) instance_gradients(const Arguments a, const Plan p) {
  __shared__ Sums held[kThreads];
  const int32_t channel = int32_t(blockIdx.x) / p.feature_chunks;
  const int32_t n = channel / p.feature_channels, c = channel % p.feature_channels;
  const int32_t voxels = p.coarse_voxels, step = p.feature_chunks * kThreads;
  if (scale_of(a, p, n, p.image_channels + c) == 0.0f) return;
  join_partial(held, p.gradient_partial + channel * p.feature_chunks, p.feature_chunks, Sums{0, 0});
  const float mean = float(held[0].value / double(voxels)), mean_product = float(held[0].product / double(voxels));
  const float shift = a.feature_stats[2 * channel], gain = a.feature_stats[2 * channel + 1];
  float* grad = static_cast<float*>(a.grad_features.data) + int64_t(channel) * voxels;
  for (int32_t v = int32_t(blockIdx.x) % p.feature_chunks * kThreads + int32_t(threadIdx.x); v < voxels; v += step)
    grad[v] = norm_gradient(grad[v], normalized_feature(a, p, n, c, v, shift, gain), gain, mean, mean_product);
}

// Through the same map over the channels of each voxel, in place. A thread a coarse voxel.
__global__ void __launch_bounds__(kThreads, kResident) voxel_gradients(const Arguments a, const Plan p) {
  const int32_t voxels = p.coarse_voxels, blocks = (voxels + kThreads - 1) / kThreads;
  const int32_t n = int32_t(blockIdx.x) / blocks, v = int32_t(blockIdx.x) % blocks * kThreads + int32_t(threadIdx.x);
  if (v >= voxels || !any_kept(a, p, n, p.image_channels, p.image_channels + p.feature_channels)) return;
  const float* stats = a.feature_stats + int64_t(2) * n * voxels + v;
  const float shift = stats[0], gain = stats[voxels], channels = float(p.feature_channels);
  float* grad = static_cast<float*>(a.grad_features.data) + int64_t(n) * p.feature_channels * voxels + v;
  float mean = 0.0f, product = 0.0f;
  for (int32_t c = 0; c < p.feature_channels; ++c) {
    mean += grad[int64_t(c) * voxels];
    product += grad[int64_t(c) * voxels] * normalized_feature(a, p, n, c, v, shift, gain);
  }
  voxel_gradient_means(a.feature_norm, gain, channels, a.eps, &mean, &product);
  for (int32_t c = 0; c < p.feature_channels; ++c) {
    float* g = grad + int64_t(c) * voxels;
    *g = norm_gradient(*g, normalized_feature(a, p, n, c, v, shift, gain), gain, mean, product);
  }
}

// ---- the host's part -----------------------------------------------------------------------------------------------

bool flat(const FuseStreamsTensor& t, const int64_t* size) {
  return (size[1] == 1 || t.strides[3] == size[2] * t.strides[4]) &&
         (size[0] == 1 || t.strides[2] == size[1] * size[2] * t.strides[4]);
}

// `count`: voxels a packet, 1 where there are none; channels and samples must begin on a packet, too.
Lie lie_of(const FuseStreamsTensor& t, const int64_t* size, int64_t batch, int64_t channels, int64_t count) {
  const int64_t bytes = smaller(16, bytes_of(t.type) * count);
  const bool dense = flat(t, size) && (t.strides[4] == 1 || size[0] * size[1] * size[2] == 1);
  const auto even = [&](int64_t length, int64_t stride) { return length == 1 || stride * bytes_of(t.type) % bytes == 0; };
  return {flat(t, size), count > 1 && t.data && dense && size[0] * size[1] * size[2] % count == 0 && aligned(t.data, bytes) &&
                             even(batch, t.strides[0]) && even(channels, t.strides[1])};
}

// Whether the channels of a sample fill one piece of memory, in whatever order.
bool whole(const FuseStreamsTensor& t, const int64_t* size, int64_t channels) {
  const int64_t voxels = size[0] * size[1] * size[2];
  if (!flat(t, size)) return false;
  return channels == 1 ? t.strides[4] == 1 || voxels == 1
                       : (t.strides[4] == 1 && t.strides[1] == voxels) || (t.strides[1] == 1 && t.strides[4] == channels);
}

bool too_large(const Arguments& a) {
  for (int i = 0; i < 3; ++i)
    if (a.size[i] > kLongestAxis) return true;
  return a.size[0] * a.size[1] * a.size[2] > kMostVoxels || a.batch > kMostBlocks || a.out_channels > kMostBlocks;
}

// The workspace: partial statistics, or in the backward pass partial sums, which take less.
int64_t image_bytes(const Arguments& a) {
  return a.image_norm == kMinMax ? a.batch * kChunks * int64_t(sizeof(Extremes)) : 0;
}
int64_t workspace_bytes(const Arguments& a) {
  return image_bytes(a) +
         (a.feature_norm == kInstance ? a.batch * a.feature_channels * kChunks * int64_t(sizeof(Spread)) : 0);
}

Plan plan_of(const Arguments& a, void* workspace) {
  Plan p{};
  const int64_t voxels = a.size[0] * a.size[1] * a.size[2], coarse = a.coarse[0] * a.coarse[1] * a.coarse[2];
  p.same = a.size[0] == a.coarse[0] && a.size[1] == a.coarse[1] && a.size[2] == a.coarse[2];
  for (int i = 0; i < 3; ++i) p.size[i] = int32_t(a.size[i]), p.coarse[i] = int32_t(a.coarse[i]);
  p.voxels = int32_t(voxels), p.coarse_voxels = int32_t(coarse);
  p.image_channels = int32_t(a.image_channels), p.feature_channels = int32_t(a.feature_channels);
  p.out_channels = int32_t(a.out_channels);
  p.image_whole = whole(a.image, a.size, a.image_channels) && voxels * a.image_channels <= kMostVoxels;
  p.image_chunks = chunks_of(p.image_whole ? voxels * a.image_channels : voxels, 1);
  // Channels that are neighbours in memory share a block: each sector is then read once.
  const bool last = a.features.strides[1] == 1 && a.features.strides[4] == a.feature_channels;
  p.feature_lanes = last && a.feature_channels > 1 && a.feature_channels <= kThreads ? int(a.feature_channels) : 1;
  p.feature_chunks = chunks_of(coarse, p.feature_lanes);
  p.image_partial = static_cast<Extremes*>(workspace);
  p.feature_partial = reinterpret_cast<Spread*>(static_cast<char*>(workspace) + image_bytes(a));
  p.gradient_partial = static_cast<Sums*>(workspace);
  return p;
}

// How an output pass over rows is cut: `count` voxels a packet, `rows` channels of samples.
void cut_rows(Plan* p, const Arguments& a, int64_t count, int64_t rows) {
  const int64_t packets = a.size[0] * a.size[1] * a.size[2] / count;
  const int64_t rounds = larger(1, smaller(kRounds, packets * rows / (kThreads * kBlocks)));
  p->range = int32_t(rounds * kThreads);
  p->ranges = int32_t(divide_up(packets, p->range));
}

template <class Out, int COUNT>
int output_pass(const Arguments& a, Plan p, cudaStream_t stream) {
  const bool last = a.out.strides[1] == 1 && a.out_channels > 1;
  const int64_t streams = a.image_channels + a.feature_channels, voxels = a.size[0] * a.size[1] * a.size[2];
  if (last) {
    int64_t tile = 256;
    const auto bytes = [&] { return table_bytes(streams) + tile_bytes(a.out_channels, tile, sizeof(Out)); };
    while (tile > 8 && bytes() > kTileBytes) tile /= 2;
    if (bytes() <= kTileBytes) {
      const int64_t tiles = divide_up(voxels, tile);
      p.tile = int32_t(tile);
      p.rounds = int32_t(larger(1, smaller(kRounds, tiles * a.batch / kBlocks)));
      p.out_packets = aligned(a.out.data, 16) && (a.batch == 1 || a.out.strides[0] * int64_t(sizeof(Out)) % 16 == 0);
      const int64_t blocks = divide_up(tiles, p.rounds) * a.batch;
      if (blocks > kMostBlocks) return kTooLarge;
      launch(fuse_voxels<Out, COUNT>, blocks, bytes(), stream, a, p);
      return kOk;
    }
  }
  // More channels than shared memory holds: rows whose voxels are apart, one at a time.
  const int64_t count = last ? 1 : COUNT;
  cut_rows(&p, a, count, a.batch * a.out_channels);
  const int64_t blocks = a.batch * a.out_channels * p.ranges;
  if (blocks > kMostBlocks) return kTooLarge;
  if (last)
    launch(fuse_rows<Out, 1>, blocks, 0, stream, a, p);
  else
    launch(fuse_rows<Out, COUNT>, blocks, 0, stream, a, p);
  return kOk;
}

template <class Out>
int output_pass(const Arguments& a, const Plan& p, bool packets, cudaStream_t stream) {
  return packets ? output_pass<Out, 16 / sizeof(Out)>(a, p, stream) : output_pass<Out, 1>(a, p, stream);
}

int forward(const Arguments& a, void* workspace, int64_t bytes) {
  if (a.image.type < kFloat32 || a.image.type > kUInt8 || !is_float_type(a.out.type)) return kBadType;
  if (a.feature_channels && !is_float_type(a.features.type)) return kBadType;
  if (too_large(a)) return kTooLarge;
  if (bytes < workspace_bytes(a)) return kSmallWorkspace;
  const auto stream = static_cast<cudaStream_t>(a.stream);
  const int64_t coarse = a.coarse[0] * a.coarse[1] * a.coarse[2];
  Plan p = plan_of(a, workspace);
  // The statistics read packets of 128 bits of whatever the type is.
  FuseStreamsTensor one = a.image;
  if (p.image_whole) one.strides[4] = 1;
  const int64_t image_size[3] = {p.image_whole ? a.image_channels : 1, 1, a.size[0] * a.size[1] * a.size[2]};
  if (p.image_whole)
    one.strides[3] = one.strides[2] = image_size[2], p.image = lie_of(one, image_size, a.batch, 1, 16 / bytes_of(one.type));
  else
    p.image = lie_of(a.image, a.size, a.batch, a.image_channels, 16 / bytes_of(a.image.type));
  p.features = lie_of(a.features, a.coarse, a.batch, a.feature_channels, 16 / bytes_of(a.features.type));
  p.image_blocks = a.image_norm == kMinMax ? a.batch * p.image_chunks : 0;
  p.statistic_blocks = p.image_blocks;
  if (a.feature_channels && a.feature_norm == kInstance)
    p.statistic_blocks += a.batch * p.feature_chunks * (p.feature_lanes == 1 ? a.feature_channels : 1);
  else if (a.feature_channels && a.feature_norm != kNoFeatureNorm)
    p.statistic_blocks += a.batch * divide_up(coarse, kThreads);
  if (p.statistic_blocks > kMostBlocks) return kTooLarge;
  if (p.statistic_blocks) launch(statistics, p.statistic_blocks, 0, stream, a, p);

  // The output pass moves packets that stay within a row, as many voxels as make 128 bits of the result.
  const int64_t count = 16 / bytes_of(a.out.type);
  const bool last = a.out.strides[1] == 1 && a.out_channels > 1;
  const bool packets = a.size[2] % count == 0 && (last || lie_of(a.out, a.size, a.batch, a.out_channels, count).packets);
  p.image = lie_of(a.image, a.size, a.batch, a.image_channels, packets ? count : 1);
  p.features = lie_of(a.features, a.coarse, a.batch, a.feature_channels, packets ? count : 1);
  const int status = a.out.type == kFloat32   ? output_pass<float>(a, p, packets, stream)
                     : a.out.type == kFloat16 ? output_pass<Half>(a, p, packets, stream)
                                              : output_pass<BFloat16>(a, p, packets, stream);
  return status;
}

template <class Out>
int image_pass(const Arguments& a, Plan p, cudaStream_t stream) {
  constexpr int64_t kCount = 16 / sizeof(Out);
  const bool packets =
      a.size[2] % kCount == 0 && lie_of(a.grad_image, a.size, a.batch, a.image_channels, kCount).packets;
  const int64_t count = packets ? kCount : 1;
  p.out = lie_of(a.out, a.size, a.batch, a.out_channels, count);
  p.image = lie_of(a.image, a.size, a.batch, a.image_channels, count);
  cut_rows(&p, a, count, a.batch * a.image_channels);
  const int64_t blocks = a.batch * a.image_channels * p.ranges;
  if (blocks > kMostBlocks) return kTooLarge;
  if (packets)
    launch(image_gradients<Out, kCount>, blocks, 0, stream, a, p);
  else
    launch(image_gradients<Out, 1>, blocks, 0, stream, a, p);
  return kOk;
}

int backward(const Arguments& a, void* workspace, int64_t bytes) {
  const auto stream = static_cast<cudaStream_t>(a.stream);
  if (!is_float_type(a.out.type) || (a.grad_image.data && !is_float_type(a.grad_image.type))) return kBadType;
  if (a.grad_features.data && (a.grad_features.type != kFloat32 || !is_float_type(a.features.type))) return kBadType;
  if (too_large(a)) return kTooLarge;
  Plan p = plan_of(a, workspace);
  if (a.grad_image.data)
    if (const int status = a.grad_image.type == kFloat32   ? image_pass<float>(a, p, stream)
                           : a.grad_image.type == kFloat16 ? image_pass<Half>(a, p, stream)
                                                           : image_pass<BFloat16>(a, p, stream))
      return status;
  if (!a.grad_features.data) return kOk;
  if (bytes < workspace_bytes(a)) return kSmallWorkspace;
  p.out = lie_of(a.out, a.size, a.batch, a.out_channels, 1);
  p.features = lie_of(a.features, a.coarse, a.batch, a.feature_channels, 1);
  p.feature_chunks = int(larger(1, smaller(kChunks, divide_up(a.coarse[0] * a.coarse[1] * a.coarse[2], kThreads))));
  const int64_t blocks = a.batch * a.feature_channels * p.feature_chunks;
  if (blocks > kMostBlocks) return kTooLarge;
  launch(gather_gradients, blocks, 0, stream, a, p);
  if (a.feature_norm == kInstance) launch(instance_gradients, blocks, 0, stream, a, p);
  if (a.feature_norm == kUnit || a.feature_norm == kStandard) {
    const int64_t voxel_blocks = a.batch * divide_up(a.coarse[0] * a.coarse[1] * a.coarse[2], kThreads);
    if (voxel_blocks > kMostBlocks) return kTooLarge;
    launch(voxel_gradients, voxel_blocks, 0, stream, a, p);
  }
  return kOk;
}

// What the launches themselves had to say; what goes wrong while they run is said by a later call of CUDA.
int finished(int status) {
  const cudaError_t error = cudaGetLastError();
  return status ? status : error == cudaSuccess ? kOk : kCudaError + int(error);
}

}  // namespace

// Bytes of device memory that a call of either direction needs; -1 for arguments of another version.
DGF_EXPORT int64_t dgf_fuse_streams_workspace(const FuseStreamsArguments* arguments) {
  return arguments->bytes == sizeof(FuseStreamsArguments) ? workspace_bytes(*arguments) : -1;
}

DGF_EXPORT int dgf_fuse_streams_forward(const FuseStreamsArguments* arguments, void* workspace, int64_t bytes) {
  if (arguments->bytes != sizeof(FuseStreamsArguments)) return kOtherVersion;
  return finished(forward(*arguments, workspace, bytes));
}

DGF_EXPORT int dgf_fuse_streams_backward(const FuseStreamsArguments* arguments, void* workspace, int64_t bytes) {
  if (arguments->bytes != sizeof(FuseStreamsArguments)) return kOtherVersion;
  return finished(backward(*arguments, workspace, bytes));
}

// CUDA's words for a status of kCudaError and above.
DGF_EXPORT const char* dgf_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - kCudaError)); }
