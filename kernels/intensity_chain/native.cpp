// intensity_chain on the CPU.
//
// A sample is one or more passes over its voxels, each over fixed chunks of its channels:
//
//   nothing needs statistics                1   all stages, written
//   gamma, contrast or rescale              2   noise, Rician and bias, written, with statistics; the rest, in place
//   contrast after gamma                    3   the mean of the channels after gamma in between
//
// and where there is neither noise nor a bias field the first of several passes writes nothing. Chunks depend on sizes
// alone and are combined in order, so the number of threads does not change a bit. A chunk is done in pieces that stay in
// the first cache, stage by stage, each a loop of its own.
#include "native.h"

namespace {

using Arguments = IntensityChainArguments;

enum Status { kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3 };

constexpr int64_t kPiece = 1024;                 // voxels that go through all stages together
constexpr int64_t kChunk = 1 << 14;              // voxels of a channel whose statistics are one partial result
constexpr int64_t kSerial = 1 << 15;             // voxels below which threads cost more than they save
constexpr int64_t kBatch = 64;                   // counters that philox turns into words together
constexpr int64_t kNoise = kPiece + 8 * kBatch;  // floats that `noise` may write for a piece
constexpr float kTiny = 1.17549435e-38f;         // the smallest normal number
constexpr double kGammaEpsilon = 1e-7;           // MONAI's, added to the range

// Loops stay functions of their own: inlined into a parallel region, GCC does not vectorise them.
#define DGF_NOINLINE __attribute__((noinline))

struct Key {
  uint32_t low, high;
  explicit Key(int64_t seed) : low(uint32_t(uint64_t(seed))), high(uint32_t(uint64_t(seed) >> 32)) {}
};

// The normals of kBatch counters from `counter` on: 4 · kBatch floats.
DGF_NOINLINE void normals(Key key, uint32_t stream, uint64_t counter, float* __restrict out) {
  uint64_t words[4][kBatch];
  for (uint64_t i = 0; i < kBatch; ++i) words[0][i] = counter + i;
  for (int i = 0; i < kBatch; i += kLanes) {
    Lanes c[4], zero = {};
    std::memcpy(c, words[0] + i, sizeof(Lanes));
    c[1] = c[0] >> 32, c[2] = zero + stream, c[3] = zero;
    philox(c, key.low, key.high);
    for (int word = 0; word < 4; ++word) std::memcpy(words[word] + i, c + word, sizeof(Lanes));
  }
  for (int i = 0; i < kBatch; ++i) {
    box_muller(uint32_t(words[0][i]), uint32_t(words[1][i]), out + 4 * i, out + 4 * i + 1);
    box_muller(uint32_t(words[2][i]), uint32_t(words[3][i]), out + 4 * i + 2, out + 4 * i + 3);
  }
}

// The noise of voxels [begin, begin + n) of a sample; where it lies in `buffer`, which holds kNoise.
const float* noise(Key key, uint32_t stream, int64_t begin, int64_t n, float* buffer) {
  const uint64_t first = uint64_t(begin) / 4, last = uint64_t(begin + n + 3) / 4;
  for (uint64_t at = first; at < last; at += kBatch) normals(key, stream, at, buffer + 4 * (at - first));
  return buffer + begin % 4;
}

DGF_NOINLINE void add_noise(const float* x, const float* __restrict z, float std, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + std * z[i];
}

DGF_NOINLINE void add_rician(const float* x, const float* __restrict real, const float* __restrict imaginary, float std,
                             int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float a = x[i] + std * real[i], b = std * imaginary[i];
    out[i] = __builtin_sqrtf(a * a + b * b);
  }
}

DGF_NOINLINE void multiply_exp(const float* x, const float* __restrict log_field, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * exp2_of(log_field[i] * 1.44269504f);
}

DGF_NOINLINE void cubic(const float* __restrict m, int64_t first, int64_t n, float step, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const float t = float(int32_t(first + i)) * step - 1.0f;
    out[i] = ((m[3] * t + m[2]) * t + m[1]) * t + m[0];
  }
}

// The logarithm of the bias field, a row at a time: a cubic along x whose coefficients a plane and a row determine.
struct LogField {
  const float* c;  // (20) of the sample
  const int64_t* size;
  int64_t plane = -1;
  double of_plane[4][4];  // Σ_i c_ijk P_i(z)

  static double coordinate(int64_t i, int64_t n) { return n > 1 ? 2.0 * double(i) / double(n - 1) - 1.0 : -1.0; }
  static void legendre(double t, double* p) {
    p[0] = 1, p[1] = t, p[2] = (3 * t * t - 1) / 2, p[3] = (5 * t * t - 3) * t / 2;
  }

  void enter(int64_t z) {
    double p[4];
    legendre(coordinate(z, size[0]), p);
    for (auto& row : of_plane)
      for (double& value : row) value = 0;
    const float* term = c;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4 - i; ++j)
        for (int k = 0; k < 4 - i - j; ++k) of_plane[j][k] += *term++ * p[i];
    plane = z;
  }

  void row(int64_t y, float* m) const {
    double p[4], a[4] = {0, 0, 0, 0};
    legendre(coordinate(y, size[1]), p);
    for (int j = 0; j < 4; ++j)
      for (int k = 0; k < 4 - j; ++k) a[k] += of_plane[j][k] * p[j];
    m[0] = float(a[0] - a[2] / 2), m[1] = float(a[1] - 1.5 * a[3]), m[2] = float(1.5 * a[2]), m[3] = float(2.5 * a[3]);
  }

  // Voxels [begin, begin + n) of a channel.
  void fill(int64_t begin, int64_t n, float* out) {
    const int64_t width = size[2];
    const float step = width > 1 ? float(2.0 / double(width - 1)) : 0.0f;
    for (int64_t done = 0; done < n;) {
      const int64_t r = (begin + done) / width, x = (begin + done) % width, length = least(width - x, n - done);
      if (r / size[1] != plane) enter(r / size[1]);
      float m[4];
      row(r % size[1], m);
      cubic(m, x, length, step, out + done);
      done += length;
    }
  }
};

struct Statistics {
  float low, high;
  double sum;
};
constexpr Statistics kNothingSeen{HUGE_VALF, -HUGE_VALF, 0};

void unite(Statistics* a, const Statistics& b) {
  a->low = b.low < a->low ? b.low : a->low;
  a->high = b.high > a->high ? b.high : a->high;
  a->sum += b.sum;
}

// Of at most kPiece voxels. What is summed in float is how far they are from one of them: a mean that is large beside the
// range costs nothing.
DGF_NOINLINE Statistics statistics_of(const float* __restrict x, int64_t n) {
  float low = HUGE_VALF, high = -HUGE_VALF, sum = 0;
  const float pivot = x[0];
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    sum += x[i] - pivot;
  }
  return {low, high, double(pivot) * double(n) + sum};
}

// What follows the statistics, for one channel: clamp(gain · t + offset, low, high), with t = x - shift or, under gamma,
// ((x - shift) · inverse)^gamma.
struct Finish {
  float shift = 0, inverse = 1, gamma = 1;
  double gain = 1, offset = 0, low = -HUGE_VAL, high = HUGE_VAL;

  bool scales() const { return gamma == 1 && shift == 0 && offset == 0 && low == -HUGE_VAL && high == HUGE_VAL; }

  // Followed by (y - lowest) / range, in [0, 1]; 0 where there is no range whose reciprocal float32 can hold.
  void rescale(double lowest, double range) {
    const bool varies = float(range) >= kTiny;
    const double by = varies ? 1 / range : 0;
    gain *= by, offset = (offset - lowest) * by;
    low = varies && low > lowest ? (low - lowest) * by : 0;
    high = varies ? high < lowest + range ? (high - lowest) * by : 1 : 0;
  }
};

// t^gamma for t in [0, 1], off by at most 2 · 2^-24; 0 below 2^-126, where log_of means nothing, but is finite. A t that was
// rounded to above 1 is 1: a large gamma would make it any size.
inline float power(float t, float gamma) {
  t = t < 1.0f ? t : 1.0f;
  float y = log_of(t) * gamma * 1.44269504f;
  y = y > -126.0f ? y : -126.0f;
  const float p = exp2_of(y);
  return t >= kTiny ? p : 0.0f;
}

inline float clamp(float v, float low, float high) {
  v = v > low ? v : low;
  return v < high ? v : high;
}

inline double clip(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

DGF_NOINLINE double power_sum(const float* __restrict x, int64_t n, const Finish& f) {
  const float shift = f.shift, inverse = f.inverse, gamma = f.gamma;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += power((x[i] - shift) * inverse, gamma);
  return sum;
}

DGF_NOINLINE void multiply(const float* x, int64_t n, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

DGF_NOINLINE void finish_linear(const float* x, int64_t n, const Finish& f, float* out) {
  const float shift = f.shift, gain = float(f.gain), offset = float(f.offset), low = float(f.low), high = float(f.high);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = clamp(gain * (x[i] - shift) + offset, low, high);
}

DGF_NOINLINE void finish_gamma(const float* x, int64_t n, const Finish& f, float* out) {
  const float shift = f.shift, inverse = f.inverse, gamma = f.gamma;
  const float gain = float(f.gain), offset = float(f.offset), low = float(f.low), high = float(f.high);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = clamp(gain * power((x[i] - shift) * inverse, gamma) + offset, low, high);
}

void finish(const float* x, int64_t n, const Finish& f, float* out) {
  if (f.gamma != 1)
    finish_gamma(x, n, f, out);
  else if (!f.scales())
    finish_linear(x, n, f, out);
  else if (f.gain != 1)
    multiply(x, n, float(f.gain), out);
  else if (x != out)
    std::memcpy(out, x, size_t(n) * sizeof(float));
}

// One sample of the call.
struct Sample {
  const Arguments& a;
  int64_t n, voxels, chunks;
  Key key;
  LoadRow load;
  float noise_std, rician_std, gamma;
  bool bias = false, contrast = false, rescale;
  Statistics* partial;  // (C, chunks)
  Finish* finishes;     // (C)

  Sample(const Arguments& a_, int64_t n_, int64_t voxels_, Statistics* partial_, Finish* finishes_)
      : a(a_), n(n_), voxels(voxels_), chunks((voxels_ + kChunk - 1) / kChunk), key(a_.seed[n_]), load(load_for(a_.image_type)),
        noise_std(a_.noise_std[n_]), rician_std(a_.rician_std[n_]), gamma(a_.gamma[n_]), rescale(a_.rescale[n_]),
        partial(partial_), finishes(finishes_) {
    for (int term = 0; term < 20; ++term) bias |= a.bias[n * 20 + term] != 0;
    for (int64_t c = 0; c < a.channels; ++c) contrast |= a.contrast[n * a.channels + c] != 1;
  }

  bool changed() const { return noise_std != 0 || rician_std != 0 || bias; }  // before the statistics
  bool measured() const { return gamma != 1 || contrast || rescale; }
  int64_t tasks() const { return a.channels * chunks; }

  int64_t begin(int64_t task) const { return task % chunks * kChunk; }
  int64_t end(int64_t task) const { return least(voxels, begin(task) + kChunk); }
  float* out(int64_t task) const { return a.out + (n * a.channels + task / chunks) * voxels; }

  // The image's voxels as float: where they lie or, converted, in `buffer`.
  const float* values(int64_t task, int64_t at, int64_t length, float* buffer) const {
    const int64_t offset = (n * a.channels + task / chunks) * voxels + at;
    if (a.image_type == kFloat32) return static_cast<const float*>(a.image) + offset;
    load(a.image, offset, 1, length, buffer);
    if (a.image_type == kInt16) multiply(buffer, length, 1.0f / 32767.0f, buffer);
    return buffer;
  }

  // Noise, Rician noise and bias field of voxels [at, at + length) of a channel.
  void change(int64_t task, const float* x, int64_t at, int64_t length, LogField* field, float* out) const {
    const int64_t of_sample = task / chunks * voxels + at;
    float first[kNoise], second[kNoise];
    if (noise_std != 0) {
      add_noise(x, noise(key, 0, of_sample, length, first), noise_std, length, out);
      x = out;
    }
    if (rician_std != 0) {
      const float *real = noise(key, 1, of_sample, length, first), *imaginary = noise(key, 2, of_sample, length, second);
      add_rician(x, real, imaginary, rician_std, length, out);
      x = out;
    }
    if (bias) {
      field->fill(at, length, first);
      multiply_exp(x, first, length, out);
    }
  }

  // First pass: up to the statistics, or where none are needed to the end.
  void first(int64_t task) const {
    LogField field{a.bias + n * 20, a.size, -1, {}};
    Statistics found = kNothingSeen;
    float buffer[kPiece];
    for (int64_t at = begin(task); at < end(task); at += kPiece) {
      const int64_t length = least(kPiece, end(task) - at);
      const float* x = values(task, at, length, buffer);
      float* to = out(task) + at;
      if (changed()) {
        change(task, x, at, length, &field, to);
        x = to;
      }
      if (measured())
        unite(&found, statistics_of(x, length));
      else
        finish(x, length, finishes[task / chunks], to);
    }
    partial[task] = found;
  }

  // What the passes after the first read.
  const float* source(int64_t task, int64_t at, int64_t length, float* buffer) const {
    return changed() ? out(task) + at : values(task, at, length, buffer);
  }

  void sum_powers(int64_t task) const {
    float buffer[kPiece];
    double sum = 0;
    for (int64_t at = begin(task); at < end(task); at += kPiece) {
      const int64_t length = least(kPiece, end(task) - at);
      sum += power_sum(source(task, at, length, buffer), length, finishes[task / chunks]);
    }
    partial[task].sum = sum;
  }

  void last(int64_t task) const {
    float buffer[kPiece];
    for (int64_t at = begin(task); at < end(task); at += kPiece) {
      const int64_t length = least(kPiece, end(task) - at);
      finish(source(task, at, length, buffer), length, finishes[task / chunks], out(task) + at);
    }
  }

  Statistics of_channel(int64_t c) const {
    Statistics all = kNothingSeen;
    for (int64_t i = c * chunks; i < (c + 1) * chunks; ++i) unite(&all, partial[i]);
    return all;
  }

  // finishes, of what is known before any pass: for a sample without statistics all that there is.
  void prepare() const {
    for (int64_t c = 0; c < a.channels; ++c) {
      finishes[c] = Finish();
      finishes[c].gain = a.brightness[n * a.channels + c];
    }
  }

  // finishes, of the statistics: with `powers` their sums are those after gamma. Gamma, brightness and contrast are
  // monotone, so minimum and maximum go through them; what follows gamma is affine and clipped, and becomes one step.
  void fold(bool powers) const {
    Statistics sample = kNothingSeen;
    for (int64_t c = 0; c < a.channels; ++c) unite(&sample, of_channel(c));
    double lowest = HUGE_VAL, highest = -HUGE_VAL;
    for (int64_t c = 0; c < a.channels; ++c) {
      double low, high;
      fold_channel(c, sample, powers, &low, &high);
      lowest = low < lowest ? low : lowest;
      highest = high > highest ? high : highest;
    }
    for (int64_t c = 0; rescale && c < a.channels; ++c) finishes[c].rescale(lowest, highest - lowest);
  }

  // finishes[c] but for rescale, and the extremes of its result.
  void fold_channel(int64_t c, const Statistics& sample, bool powers, double* low, double* high) const {
    const Statistics s = of_channel(c);
    const double base = sample.low, range = double(sample.high) - base, span = range + kGammaEpsilon;
    const double bright = a.brightness[n * a.channels + c], factor = a.contrast[n * a.channels + c];
    double mean = s.sum / double(voxels), middle;  // middle: what t = 0 stands for
    *low = s.low, *high = s.high;
    Finish& f = finishes[c] = Finish();
    f.gain = bright * factor;
    if (gamma != 1) {
      f.gamma = gamma, f.shift = sample.low, f.inverse = float(1 / span), f.gain *= range;
      *low = base + range * std::pow((*low - base) / span, double(gamma));
      *high = base + range * std::pow((*high - base) / span, double(gamma));
      if (powers) mean = base + range * mean;
      middle = base;
    } else {
      middle = f.shift = factor != 1 ? float(mean) : rescale ? sample.low : 0.0f;
    }
    *low *= bright, *high *= bright, mean *= bright, middle *= bright;
    f.offset = middle;
    if (factor == 1) return;
    f.offset = factor * (middle - mean) + mean, f.low = *low, f.high = *high;
    *low = clip(factor * (*low - mean) + mean, f.low, f.high);
    *high = clip(factor * (*high - mean) + mean, f.low, f.high);
  }
};

int team(int threads, int64_t voxels) { return int(least(threads, 1 + voxels / kSerial)); }

int chain(const Arguments& a) {
  if (!load_for(a.image_type)) return kBadType;
  const int64_t voxels = a.size[0] * a.size[1] * a.size[2], chunks = (voxels + kChunk - 1) / kChunk;
  Scratch<Statistics> partial(a.channels * chunks);
  Scratch<Finish> finishes(a.channels);
  if (!partial.data || !finishes.data) return kNoMemory;
#pragma omp parallel num_threads(team(a.threads, a.channels * voxels))
  for (int64_t n = 0; n < a.batch; ++n) {
    const Sample sample(a, n, voxels, partial.data, finishes.data);
#pragma omp single
    sample.prepare();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < sample.tasks(); ++task) sample.first(task);
    if (!sample.measured()) continue;
#pragma omp single
    sample.fold(false);
    if (sample.gamma != 1 && sample.contrast) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < sample.tasks(); ++task) sample.sum_powers(task);
#pragma omp single
      sample.fold(true);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < sample.tasks(); ++task) sample.last(task);
  }
  return kOk;
}

int fill_normal(const StandardNormalArguments& a) {
  const int64_t chunks = (a.size + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(team(a.threads, a.batch * a.size)) schedule(static)
  for (int64_t task = 0; task < a.batch * chunks; ++task) {
    const int64_t n = task / chunks, begin = task % chunks * kChunk, end = least(a.size, begin + kChunk);
    float buffer[kNoise];
    for (int64_t at = begin; at < end; at += kPiece) {
      const int64_t length = least(kPiece, end - at);
      const float* z = noise(Key(a.seed[n]), uint32_t(a.stream), at, length, buffer);
      std::memcpy(a.out + n * a.size + at, z, size_t(length) * sizeof(float));
    }
  }
  return kOk;
}

}  // namespace

DGF_ENTRY(intensity_chain, IntensityChainArguments) {
  return arguments->bytes == sizeof(IntensityChainArguments) ? chain(*arguments) : kOtherVersion;
}

DGF_ENTRY(standard_normal, StandardNormalArguments) {
  return arguments->bytes == sizeof(StandardNormalArguments) ? fill_normal(*arguments) : kOtherVersion;
}
