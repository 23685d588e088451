// dice_ce on the CPU: one pass over the scores forward, one backward; kernels/dice_ce/reference.py is the definition.
//
// The unit of work is a block of voxels, cut by sizes only; what blocks find is added in order: threads do not change a bit. A
// block is walked in runs of kRun voxels, whose scores of all classes fit the first cache as float: the softmax is taken there and
// never leaves it. Sums within a run are float, beyond it double.
//
// Σ log of the softmax' denominators is the log of their product, one for each run.
#include "native.h"

namespace {

enum Status { kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3, kTooMany = 5 };

constexpr int64_t kRun = 128;         // voxels
constexpr int64_t kBlock = 64 * kRun;  // voxels
constexpr int64_t kSerial = 1 << 14;  // scores below which threads cost more than they save
constexpr int64_t kSums = 3;          // of a class: Σ p over its voxels, Σ p, its voxels

// The classes of a run, a row of kRun for each, and what its voxels have in common.
struct Tile {
  Scratch<float> rows, together;  // (C, kRun), and (kRun, C) on the way from or to channels-last memory
  alignas(kLine) int32_t label[kRun];
  alignas(kLine) float greatest[kRun], scale[kRun], own[kRun];  // own: score of the label's class - greatest
  double log_sums;

  explicit Tile(const DiceCeArguments& a) : rows(a.classes * kRun), together(a.channels_last ? a.classes * kRun : 0) {}
  bool ok() const { return rows.data && together.data; }
  float* row(int64_t c) { return rows.data + c * kRun; }
};

template <class T, class LabelT>
struct DiceCe {
  const DiceCeArguments& a;
  const int64_t classes, voxels, per_sample;

  explicit DiceCe(const DiceCeArguments& arguments)
      : a(arguments), classes(a.classes), voxels(a.voxels), per_sample((voxels + kBlock - 1) / kBlock) {}

  void load(Tile& tile, int64_t n, int64_t v, int64_t length) const {
    const LabelT* label = static_cast<const LabelT*>(a.label) + n * voxels + v;
    for (int64_t k = 0; k < length; ++k) tile.label[k] = label[k] < LabelT(classes) ? int32_t(label[k]) : -1;
    const int64_t base = n * classes * voxels;
    if (!a.channels_last) {
      for (int64_t c = 0; c < classes; ++c) load_row<T>(a.scores, base + c * voxels + v, 1, length, tile.row(c));
      return;
    }
    load_row<T>(a.scores, base + v * classes, 1, length * classes, tile.together.data);
    for (int64_t c = 0; c < classes; ++c) {
      const float* __restrict from = tile.together.data + c;
      float* __restrict to = tile.row(c);
      for (int64_t k = 0; k < length; ++k) to[k] = from[k * classes];
    }
  }

  void store(Tile& tile, int64_t n, int64_t v, int64_t length) const {
    const int64_t base = n * classes * voxels;
    if (!a.channels_last) {
      for (int64_t c = 0; c < classes; ++c) store_row<T>(tile.row(c), a.grad_scores, base + c * voxels + v, 1, length);
      return;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const float* __restrict from = tile.row(c);
      float* __restrict to = tile.together.data + c;
      for (int64_t k = 0; k < length; ++k) to[k * classes] = from[k];
    }
    store_row<T>(tile.together.data, a.grad_scores, base + v * classes, 1, length * classes);
  }

  // Rows become e^(score - greatest), `scale` 1 / their sum.
  template <bool Forward>
  void exponentials(Tile& tile, int64_t length) const {
    float* __restrict greatest = tile.greatest;
    float* __restrict own = tile.own;
    float* __restrict sum = tile.scale;
    for (int64_t k = 0; k < length; ++k) greatest[k] = tile.row(0)[k], sum[k] = 0;
    for (int64_t c = 1; c < classes; ++c) {
      const float* __restrict row = tile.row(c);
      for (int64_t k = 0; k < length; ++k) greatest[k] = row[k] > greatest[k] ? row[k] : greatest[k];
    }
    if (Forward)  // a label that is no class leaves this
      for (int64_t k = 0; k < length; ++k) own[k] = __builtin_nanf("");
    for (int64_t c = 0; c < classes; ++c) {
      float* __restrict row = tile.row(c);
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) {
        const float x = row[k] - greatest[k];
        if (Forward) own[k] = tile.label[k] == int32_t(c) ? x : own[k];
        row[k] = exp_of(x);
        sum[k] += row[k];
      }
    }
    if (Forward) {
      double product = 1;
#pragma omp simd reduction(* : product)
      for (int64_t k = 0; k < length; ++k) product *= double(sum[k]);
      tile.log_sums = __builtin_log(product);
    }
    for (int64_t k = 0; k < length; ++k) sum[k] = 1.0f / sum[k];
  }

  // Sums of a block: kSums for each class, then Σ -log p of the label's class.
  void sums_of(Tile& tile, int64_t n, int64_t begin, int64_t end, double* sums) const {
    for (int64_t i = 0; i <= kSums * classes; ++i) sums[i] = 0;
    for (int64_t v = begin; v < end; v += kRun) {
      const int64_t length = least(kRun, end - v);
      load(tile, n, v, length);
      exponentials<true>(tile, length);
      for (int64_t c = a.first_class; c < classes; ++c) {
        const float* __restrict row = tile.row(c);
        float hit = 0, all = 0;
        int32_t count = 0;
#pragma omp simd reduction(+ : hit, all, count)
        for (int64_t k = 0; k < length; ++k) {
          const float p = row[k] * tile.scale[k];
          const bool mine = tile.label[k] == int32_t(c);
          all += p, hit += mine ? p : 0.0f, count += mine;
        }
        sums[kSums * c] += hit, sums[kSums * c + 1] += all, sums[kSums * c + 2] += count;
      }
      float own = 0;
#pragma omp simd reduction(+ : own)
      for (int64_t k = 0; k < length; ++k) own += tile.own[k];
      sums[kSums * classes] += tile.log_sums - double(own);
    }
  }

  // The loss, and of each sample and class what its gradient adds to a voxel of the label's class and to any.
  void combine(const double* sums, double* total) const {
    const double smooth = double(kSmooth), taken = double(classes - a.first_class), batch = double(a.batch);
    const int64_t width = kSums * classes + 1;
    double loss = 0;
    for (int64_t n = 0; n < a.batch; ++n) {
      for (int64_t i = 0; i < width; ++i) total[i] = 0;
      for (int64_t block = 0; block < per_sample; ++block)
        for (int64_t i = 0; i < width; ++i) total[i] += sums[(n * per_sample + block) * width + i];
      const double cross_entropy = total[width - 1] / double(voxels);
      // Where it is no number the sample has no gradient that is one; an infinite one leaves the Dice term as it is.
      const double spoilt = cross_entropy == cross_entropy ? 0.0 : cross_entropy;
      double dice = 0;
      for (int64_t c = 0; c < classes; ++c) {
        float* out = a.coefficients + 2 * (n * classes + c);
        out[0] = out[1] = float(spoilt);
        if (c < a.first_class) continue;
        const double* of = total + kSums * c;
        const double numerator = 2 * of[0] + smooth, denominator = of[1] + of[2] + smooth;
        dice += 1 - numerator / denominator;
        out[0] += float(-2 / (denominator * taken * batch));
        out[1] += float(numerator / (denominator * denominator * taken * batch));
      }
      loss += dice / taken + cross_entropy;
    }
    *a.loss = float(loss / batch);
  }

  void gradient(Tile& tile, int64_t n, int64_t begin, int64_t end) const {
    const float* coefficients = a.coefficients + 2 * n * classes;
    const float upstream = *a.grad, even = float(double(upstream) / (double(a.batch) * double(voxels)));
    for (int64_t v = begin; v < end; v += kRun) {
      const int64_t length = least(kRun, end - v);
      load(tile, n, v, length);
      exponentials<false>(tile, length);
      float* __restrict mean = tile.own;  // Σ over classes of p · what their sums' gradients add
      for (int64_t k = 0; k < length; ++k) mean[k] = 0;
      for (int64_t c = 0; c < classes; ++c) {
        float* __restrict row = tile.row(c);
        const float hit = coefficients[2 * c] * upstream, all = coefficients[2 * c + 1] * upstream;
        for (int64_t k = 0; k < length; ++k) {
          row[k] *= tile.scale[k];
          mean[k] += row[k] * (all + (tile.label[k] == int32_t(c) ? hit : 0.0f));
        }
      }
      for (int64_t c = 0; c < classes; ++c) {
        float* __restrict row = tile.row(c);
        const float hit = coefficients[2 * c] * upstream, all = coefficients[2 * c + 1] * upstream + even;
        for (int64_t k = 0; k < length; ++k) {
          const bool mine = tile.label[k] == int32_t(c);
          row[k] = row[k] * ((all - mean[k]) + (mine ? hit : 0.0f)) - (mine ? even : 0.0f);
        }
      }
      store(tile, n, v, length);
    }
  }

  int all(bool forward) const {
    const int64_t blocks = a.batch * per_sample, width = kSums * classes + 1;
    const int team = int(least(a.threads, 1 + a.batch * classes * voxels / kSerial));
    Scratch<double> sums(forward ? blocks * width : 0), total(forward ? width : 0);
    if (!sums.data || !total.data) return kNoMemory;
    int status = kOk;
#pragma omp parallel num_threads(team)
    {
      Tile tile(a);
      if (!tile.ok()) {
#pragma omp atomic write
        status = kNoMemory;
      }
#pragma omp barrier
      if (status == kOk)
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks; ++task) {
          const int64_t n = task / per_sample, begin = task % per_sample * kBlock, end = least(voxels, begin + kBlock);
          if (forward)
            sums_of(tile, n, begin, end, sums.data + task * width);
          else
            gradient(tile, n, begin, end);
        }
    }
    if (forward && status == kOk) combine(sums.data, total.data);
    return status;
  }
};

template <class T>
int dice_ce_label(const DiceCeArguments& a, bool forward) {
  switch (a.label_bytes) {
    case 1: return DiceCe<T, uint8_t>(a).all(forward);
    case 2: return DiceCe<T, uint16_t>(a).all(forward);
    case 4: return DiceCe<T, uint32_t>(a).all(forward);
    case 8: return DiceCe<T, uint64_t>(a).all(forward);
    default: return kBadType;
  }
}

int dice_ce(const DiceCeArguments& a, bool forward) {
  using Function = int (*)(const DiceCeArguments&, bool);
  if (a.bytes != sizeof(DiceCeArguments)) return kOtherVersion;
  if (a.classes > kMostClasses) return kTooMany;
  const Function function = of_float<Function>(a.type, dice_ce_label<float>, dice_ce_label<Half>, dice_ce_label<BFloat16>);
  return function ? function(a, forward) : int(kBadType);
}

}  // namespace

DGF_ENTRY(dice_ce_forward, DiceCeArguments) { return dice_ce(*arguments, true); }
DGF_ENTRY(dice_ce_backward, DiceCeArguments) { return dice_ce(*arguments, false); }
