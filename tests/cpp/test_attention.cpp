// Attention: forward, backward and weights against plain loops in double precision.
#include <array>

#include "support.h"

namespace seqkernels::test {
namespace {

// Cases
// -------------------------------------------------------------------------------------------------------

enum Layout { kByTokens, kByHeads, kGaps, kLayouts };  // gaps: memory between the rows that is not ours
constexpr const char* kLayoutNames[] = {"by tokens", "by heads", "rows with gaps"};
constexpr const char* kMaskNames[] = {"no mask", "boolean mask", "additive mask", "additive mask of acc"};

// [B, H, T, features] in memory; with cu, sequence b begins at token cu[b] of the only row.
struct Rows {
  int64_t b, h, t, size;
  const int64_t* cu;
  int64_t at(int64_t seq, int64_t head, int64_t token) const {
    return cu ? head * h + (cu[seq] + token) * t : seq * b + head * h + token * t;
  }
};

struct Case {
  DType dtype;
  int64_t B, Hq, Hk, Tq, Tk, D, Dv;
  Layout layout;
  MaskKind mask;
  bool broadcast[4], turned;  // the mask along B, Hq, Tq, Tk; in memory: keys before queries
  bool packed, bottom_right, sinks, dlse, want_dmask, mean;
  int alibi, threads;  // dimensions of alibi
  double scale, softcap, size;
  int64_t left, right;
  Dropout dropout;
  std::vector<int64_t> cu_q, cu_k, len_k;

  static constexpr double kBound = 256;  // of errors of f32 and f64, in eps: of logits up to 100
  DType acc() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  DType rounding(const std::string& name) const {
    return name == "lse" || name == "dmask" || name == "dsinks" ? acc() : dtype;
  }
  int64_t queries(int64_t b) const { return packed ? cu_q[size_t(b + 1)] - cu_q[size_t(b)] : Tq; }
  int64_t keys(int64_t b) const {
    return packed ? cu_k[size_t(b + 1)] - cu_k[size_t(b)] : len_k.empty() ? Tk : len_k[size_t(b)];
  }
  Rows rows(bool of_keys, int64_t heads, int64_t features) const {
    const std::vector<int64_t>& cu = of_keys ? cu_k : cu_q;
    const int64_t tokens = packed    ? cu.back()
                           : of_keys ? Tk
                                     : Tq,
                  gap = layout == kGaps ? 3 : 0, width = features + gap,
                  all = (packed ? 1 : B) * heads * tokens;
    return {heads * tokens * width, layout == kByHeads ? tokens * width : width,
            layout == kByHeads ? width : heads * width, all ? all * width - gap : 0,
            packed ? cu.data() : nullptr};
  }
  Rows q() const { return rows(false, Hq, D); }
  Rows k() const { return rows(true, Hk, D); }
  Rows v() const { return rows(true, Hk, Dv); }
  Rows out() const { return rows(false, Hq, Dv); }
  Rows lse() const {
    return packed ? Rows{0, cu_q.back(), 1, Hq * cu_q.back(), cu_q.data()}
                  : Rows{Hq * Tq, Tq, 1, B * Hq * Tq, nullptr};
  }
  // Where the mask has (b, h, i, j); `turn`: as in memory, otherwise contiguous.
  int64_t mask_at(int64_t b, int64_t h, int64_t i, int64_t j, bool turn) const {
    const int64_t queries = broadcast[2] ? 1 : Tq, keys = broadcast[3] ? 1 : Tk,
                  heads = broadcast[1] ? 1 : Hq;
    i = broadcast[2] ? 0 : i, j = broadcast[3] ? 0 : j;
    return ((broadcast[0] ? 0 : b) * heads + (broadcast[1] ? 0 : h)) * queries * keys +
           (turn ? j * queries + i : i * keys + j);
  }
  int64_t mask_size() const {
    const int64_t full[] = {B, Hq, Tq, Tk};
    int64_t n = 1;
    for (int i = 0; i < 4; i++) n *= broadcast[i] ? 1 : full[i];
    return n;
  }

  std::string text() const {
    char line[512];
    std::snprintf(
        line, sizeof line,
        "attention %s %s B=%d Hq=%d Hk=%d Tq=%d Tk=%d D=%d Dv=%d %s broadcast=%d%d%d%d turned=%d "
        "packed=%d len_k=%d bottom_right=%d left=%lld right=%lld scale=%g softcap=%g size=%g alibi=%d "
        "sinks=%d dlse=%d dmask=%d mean=%d dropout=%g threads=%d",
        kDTypeNames[int(dtype)], kLayoutNames[layout], int(B), int(Hq), int(Hk), int(Tq), int(Tk), int(D),
        int(Dv), kMaskNames[int(mask)], broadcast[0], broadcast[1], broadcast[2], broadcast[3], turned,
        packed, !len_k.empty(), bottom_right, static_cast<long long>(left), static_cast<long long>(right),
        scale, softcap, size, alibi, sinks, dlse, want_dmask, mean, double(dropout.threshold) / 4294967296.0,
        threads);
    return line;
  }
};

// Lengths of the sequences, once the sizes are settled.
Case finish(Case c, Random& random) {
  const bool lengths = !c.packed && random.one_in(3);
  c.cu_q.assign(1, 0), c.cu_k.assign(1, 0);
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t b = 0; b < c.B; b++) {
    const int64_t n = random.below(c.Tq + 1), m = random.one_in(4) ? 0 : random.below(c.Tk + 1);
    c.cu_q.push_back(c.cu_q.back() + n), c.cu_k.push_back(c.cu_k.back() + m);
    longest_q = std::max(longest_q, n), longest_k = std::max(longest_k, m);
    if (lengths) c.len_k.push_back(random.one_in(3) ? c.Tk : m);
  }
  if (c.packed) c.Tq = longest_q, c.Tk = longest_k, c.mask = MaskKind::none;
  c.want_dmask &= c.mask == MaskKind::additive || c.mask == MaskKind::additive_acc;
  // Without it all dS of a query add up to zero, and only their rounding would be left.
  c.dlse |= c.broadcast[3] || c.left == 0 || c.Tk == 1;
  return c;
}

Case random_case(DType dtype, MaskKind mask, Random& random) {
  const std::vector<int64_t> features{1, 3, 8, 16, 17, 33, 64, 72};
  Case c{};
  c.dtype = dtype, c.mask = mask, c.layout = Layout(random.below(kLayouts));
  c.B = random.of<int64_t>({1, 1, 2, 3}), c.Hk = 1 + random.below(3),
  c.Hq = c.Hk * random.of<int64_t>({1, 2, 3});
  c.Tq = random.of<int64_t>({0, 1, 1, 2, 3, 8, 31, 65, 130}),
  c.Tk = random.of<int64_t>({0, 1, 3, 17, 64, 97, 300});
  c.D = random.of(features), c.Dv = random.one_in(2) ? c.D : random.of(features);
  c.threads = 1 + int(random.below(3));
  for (bool& along : c.broadcast) along = random.one_in(3);
  c.turned = random.one_in(4), c.packed = mask == MaskKind::none && random.one_in(2);
  c.bottom_right = random.one_in(2);
  c.left = random.of<int64_t>({INT64_MAX, INT64_MAX, 0, 3, 40});
  c.right = random.of<int64_t>({INT64_MAX, INT64_MAX, 0, 0, 5, -2});
  c.size = random.of<double>({1, 6});  // large scores move the reference of softmax
  c.scale = random.of<double>({1 / std::sqrt(double(c.D)), 0.5, -0.25, 0});
  c.softcap = random.one_in(3) ? 2 : 0, c.alibi = int(random.below(3));
  c.sinks = random.one_in(3), c.dlse = random.one_in(2), c.want_dmask = !random.one_in(3),
  c.mean = random.one_in(2);
  if (random.one_in(3)) {
    const double probability = random.of<double>({0.1, 0.5, 1});
    c.dropout.threshold = uint64_t(std::min(probability * 4294967296.0, 4294967295.0));
    c.dropout.factor = probability < 1 ? 1 / (1 - probability) : 0;
    c.dropout.seed = uint64_t(random.below(INT64_MAX)), c.dropout.offset = uint64_t(random.below(INT64_MAX));
  }
  const int64_t query =
      c.B * c.Hq * (c.Tk + 1) * (c.D + c.Dv + 8);  // multiply-adds: keep the reference short
  c.Tq = std::clamp<int64_t>(2000000 / query, 1, c.Tq);
  return finish(c, random);
}

// Beyond a block of keys of every kernel, with work for several threads.
Case sized(Case c, int64_t B, int64_t Hq, int64_t Hk, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv,
           Random& random) {
  c.B = B, c.Hq = Hq, c.Hk = Hk, c.Tq = Tq, c.Tk = Tk, c.D = D, c.Dv = Dv;
  c.threads = 3, c.scale = 1 / std::sqrt(double(D) + 1);
  c.len_k.clear();
  return finish(c, random);
}

// Reference
// ---------------------------------------------------------------------------------------------------

struct Reference {
  const Case& c;
  const Truth& in;
  const std::vector<uint8_t>& shown;  // of a boolean mask

  struct Logit {
    double x, slope;  // -inf where the key is hidden; derivative by Q K^T
  };
  const double* row(const char* name, const Rows& rows, int64_t b, int64_t h, int64_t t) const {
    return in.at(name).data() + rows.at(b, h, t);
  }
  Logit logit(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t distance = j - i - (c.bottom_right ? c.keys(b) - c.queries(b) : 0);
    if ((c.left != INT64_MAX && distance < -c.left) || (c.right != INT64_MAX && distance > c.right))
      return {-INFINITY, 0};
    const double *q = row("q", c.q(), b, h, i), *k = row("k", c.k(), b, h * c.Hk / c.Hq, j);
    double s = 0, slope = c.scale;
    for (int64_t d = 0; d < c.D; d++) s += q[d] * k[d];
    s *= c.scale;
    if (c.softcap != 0) {
      const double t = std::tanh(s / c.softcap);
      s = c.softcap * t, slope *= 1 - t * t;
    }
    if (c.alibi) s -= in.at("alibi")[size_t((c.alibi == 2 ? b * c.Hq : 0) + h)] * std::fabs(double(distance));
    if (c.mask == MaskKind::boolean && !shown[size_t(c.mask_at(b, h, i, j, c.turned))]) s = -INFINITY;
    if (c.mask > MaskKind::boolean) s += in.at("mask")[size_t(c.mask_at(b, h, i, j, c.turned))];
    return {s, slope};
  }
  // What dropout makes of a weight of 1: Philox 4x32-7, number by number.
  double stays(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const Dropout& drop = c.dropout;
    std::array<uint32_t, 4> n{uint32_t(j / 4), uint32_t(uint64_t(i) ^ drop.offset >> 32),
                              uint32_t(b * c.Hq + h), uint32_t(drop.offset)};
    uint32_t key[] = {uint32_t(drop.seed), uint32_t(drop.seed >> 32)};
    for (int round = 0; round < 7; round++) {
      const uint64_t x = uint64_t(n[0]) * 0xd2511f53, y = uint64_t(n[2]) * 0xcd9e8d57;
      n = {uint32_t(y >> 32) ^ n[1] ^ key[0], uint32_t(y), uint32_t(x >> 32) ^ n[3] ^ key[1], uint32_t(x)};
      key[0] += 0x9e3779b9, key[1] += 0xbb67ae85;
    }
    return n[size_t(j % 4)] >= drop.threshold ? drop.factor : 0;
  }
  // each(b, h, i) of all queries.
  template <class Each>
  void queries(const Each& each) const {
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t h = 0; h < c.Hq; h++)
        for (int64_t i = 0; i < c.queries(b); i++) each(b, h, i);
  }

  // Between the rows of all outputs: NaN, as they were.
  Truth forward() const {
    Truth truth;
    Values &out = truth["out"], &lse = truth["lse"];
    out.assign(size_t(c.out().size), NAN), lse.assign(size_t(c.lse().size), NAN);
    queries([&](int64_t b, int64_t h, int64_t i) {
      const double sink = c.sinks ? in.at("sinks")[size_t(h)] : -INFINITY;
      Values x;
      double top = sink, sum = 0;
      for (int64_t j = 0; j < c.keys(b); j++) x.push_back(logit(b, h, i, j).x), top = std::max(top, x.back());
      double* o = out.data() + c.out().at(b, h, i);
      std::fill_n(o, c.Dv, 0.0);
      lse[size_t(c.lse().at(b, h, i))] = -INFINITY;
      if (top == -INFINITY) return;
      for (const double logit : x) sum += std::exp(logit - top);
      const double total = top + std::log(sum + std::exp(sink - top));
      lse[size_t(c.lse().at(b, h, i))] = total;
      for (int64_t j = 0; j < c.keys(b); j++) {
        const double p = std::exp(x[size_t(j)] - total) * stays(b, h, i, j),
                     *v = row("v", c.v(), b, h * c.Hk / c.Hq, j);
        for (int64_t d = 0; p > 0 && d < c.Dv; d++) o[d] += p * v[d];
      }
    });
    return truth;
  }

  // out and lse as given to the kernel: rounded.
  Truth backward(const Values& out, const Values& lse) const {
    Truth truth;
    const auto zeros = [&](const char* name, const Rows& rows, bool of_keys, int64_t heads,
                           int64_t features) {
      Values& x = truth[name] = Values(size_t(rows.size), NAN);
      for (int64_t b = 0; b < c.B; b++)
        for (int64_t h = 0; h < heads; h++)
          for (int64_t t = 0; t < (!of_keys ? c.queries(b) : c.packed ? c.keys(b) : c.Tk); t++)
            std::fill_n(x.begin() + rows.at(b, h, t), features, 0.0);
      return x.data();
    };
    double *dq = zeros("dq", c.q(), false, c.Hq, c.D), *dk = zeros("dk", c.k(), true, c.Hk, c.D),
           *dv = zeros("dv", c.v(), true, c.Hk, c.Dv);
    if (c.want_dmask) truth["dmask"].assign(size_t(c.mask_size()), 0);
    if (c.sinks) truth["dsinks"].assign(size_t(c.Hq), 0);
    queries([&](int64_t b, int64_t h, int64_t i) {
      const double *o = out.data() + c.out().at(b, h, i), *d_o = row("dout", c.out(), b, h, i),
                   *q = row("q", c.q(), b, h, i), total = lse[size_t(c.lse().at(b, h, i))];
      if (total == -INFINITY) return;
      double delta = c.dlse ? -in.at("dlse")[size_t(c.lse().at(b, h, i))] : 0;
      for (int64_t d = 0; d < c.Dv; d++) delta += o[d] * d_o[d];
      if (c.sinks) truth["dsinks"][size_t(h)] -= std::exp(in.at("sinks")[size_t(h)] - total) * delta;
      for (int64_t j = 0, hk = h * c.Hk / c.Hq; j < c.keys(b); j++) {
        const auto [x, slope] = logit(b, h, i, j);
        if (x == -INFINITY) continue;
        const double p = std::exp(x - total), *k = row("k", c.k(), b, hk, j), *v = row("v", c.v(), b, hk, j);
        double dp = 0;
        const double by = stays(b, h, i, j);
        for (int64_t d = 0; d < c.Dv; d++)
          dp += by * d_o[d] * v[d], dv[c.v().at(b, hk, j) + d] += by * p * d_o[d];
        const double ds = p * (dp - delta);
        if (c.want_dmask) truth["dmask"][size_t(c.mask_at(b, h, i, j, false))] += ds;
        for (int64_t d = 0; d < c.D; d++) {
          dq[c.q().at(b, h, i) + d] += ds * slope * k[d];
          dk[c.k().at(b, hk, j) + d] += ds * slope * q[d];
        }
      }
    });
    return truth;
  }

  Truth weights() const {
    Values all(size_t(c.B * (c.mean ? 1 : c.Hq) * c.Tq * c.Tk), c.mean && c.Hq == 0 ? NAN : 0.0);
    queries([&](int64_t b, int64_t h, int64_t i) {
      Values x;
      double top = -INFINITY, sum = 0, *to = all.data() + ((c.mean ? b : b * c.Hq + h) * c.Tq + i) * c.Tk;
      for (int64_t j = 0; j < c.keys(b); j++) x.push_back(logit(b, h, i, j).x), top = std::max(top, x.back());
      if (top == -INFINITY) return;
      for (double& e : x) sum += e = std::exp(e - top);
      for (int64_t j = 0; j < c.keys(b); j++)
        to[j] += x[size_t(j)] / sum * stays(b, h, i, j) / double(c.mean ? c.Hq : 1);
    });
    return {{"weights", all}};
  }
};

// Kernels
// -----------------------------------------------------------------------------------------------------

struct Call {
  const Case& c;
  const Buffers& in;
  const std::vector<uint8_t>& shown;
  const std::vector<float>& alibi;

  Heads<const void*> read(const char* name, const Rows& rows, const Buffers& from) const {
    return {pointer(from, name), rows.b, rows.h, rows.t};
  }
  Heads<void*> make(Buffers& out, const char* name, const Rows& rows) const {
    Buffer& buffer = out[name] = Buffer(c.dtype, rows.size);
    return {buffer.data(), rows.b, rows.h, rows.t};
  }
  void* make(Buffers& out, const char* name, DType type, int64_t n) const {
    return (out[name] = Buffer(type, n)).data();
  }
  // What all calls of one case share.
  template <class Params>
  Params params(const Parallel& parallel) const {
    Params p;
    p.dtype = c.dtype;
    p.B = c.B, p.Hq = c.Hq, p.Hk = c.Hk, p.Tq = c.Tq, p.Tk = c.Tk, p.D = c.D, p.Dv = c.Dv;
    p.q = read("q", c.q(), in), p.k = read("k", c.k(), in), p.v = read("v", c.v(), in);
    if (c.packed) p.cu_q = c.cu_q.data(), p.cu_k = c.cu_k.data();
    if (!c.len_k.empty()) p.len_k = c.len_k.data();
    p.scale = c.scale, p.softcap = c.softcap;
    p.left = c.left, p.right = c.right, p.bottom_right = c.bottom_right;
    if ((p.mask_kind = c.mask) != MaskKind::none) {
      p.mask = c.mask == MaskKind::boolean ? shown.data() : pointer(in, "mask");
      const int64_t queries = c.broadcast[2] ? 1 : c.Tq, keys = c.broadcast[3] ? 1 : c.Tk;
      p.mask_b = c.broadcast[0] ? 0 : (c.broadcast[1] ? 1 : c.Hq) * queries * keys;
      p.mask_h = c.broadcast[1] ? 0 : queries * keys;
      p.mask_q = c.broadcast[2] ? 0 : c.turned ? 1 : keys;
      p.mask_k = c.broadcast[3] ? 0 : c.turned ? queries : 1;
    }
    if (c.alibi) p.alibi = alibi.data(), p.alibi_b = c.alibi == 2 ? c.Hq : 0;
    p.sinks = pointer(in, "sinks");
    p.dropout = c.dropout;
    p.parallel = parallel;
    return p;
  }

  Buffers forward(const Parallel& parallel) const {
    auto p = params<AttentionFwdParams>(parallel);
    Buffers out;
    p.out = make(out, "out", c.out());
    p.lse = make(out, "lse", c.acc(), c.lse().size);
    attention_fwd(p);
    return out;
  }
  Buffers backward(const Buffers& given, const Parallel& parallel) const {
    auto p = params<AttentionBwdParams>(parallel);
    p.out = read("out", c.out(), given), p.dout = read("dout", c.out(), in);
    p.lse = pointer(given, "lse"), p.dlse = pointer(in, "dlse");
    Buffers out;
    p.dq = make(out, "dq", c.q()), p.dk = make(out, "dk", c.k()), p.dv = make(out, "dv", c.v());
    if (c.want_dmask) p.dmask = make(out, "dmask", c.acc(), c.mask_size());
    if (c.sinks) p.dsinks = make(out, "dsinks", c.acc(), c.Hq);
    attention_bwd(p);
    return out;
  }
  Buffers weights(const Parallel& parallel) const {
    auto p = params<AttentionWeightsParams>(parallel);
    p.v = {}, p.Dv = 0, p.sinks = nullptr;
    p.mean = c.mean;
    Buffers out;
    p.weights = make(out, "weights", c.dtype, c.B * (c.mean ? 1 : c.Hq) * c.Tq * c.Tk);
    attention_weights(p);
    return out;
  }
};

// Checks
// ------------------------------------------------------------------------------------------------------

void check(const Case& c, const std::vector<const char*>& isas, Random& random) {
  Buffers in;
  // What lies between the rows, and keys beyond the length, are not to be read.
  const auto input = [&](const char* name, const Rows& rows, bool of_keys, int64_t heads, int64_t features,
                         double size) {
    Values x(size_t(rows.size), NAN);
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t h = 0; h < heads; h++)
        for (int64_t t = 0; t < (of_keys ? c.keys(b) : c.queries(b)); t++) {
          const Values row = random.values(features, size);
          std::copy(row.begin(), row.end(), x.begin() + rows.at(b, h, t));
        }
    in[name] = Buffer(c.dtype, x);
  };
  input("q", c.q(), false, c.Hq, c.D, c.size), input("k", c.k(), true, c.Hk, c.D, 1);
  input("v", c.v(), true, c.Hk, c.Dv, 1), input("dout", c.out(), false, c.Hq, c.Dv, 1);
  if (c.dlse) in["dlse"] = Buffer(c.acc(), random.values(c.lse().size, 1));
  if (c.sinks) {
    Values sinks = random.values(c.Hq, 3);
    if (c.Hq && random.one_in(3)) sinks[0] = -INFINITY;
    in["sinks"] = Buffer(c.acc(), sinks);
  }
  const auto [shown, added] = random_mask(c.mask, c.mask_size(), random);
  if (c.mask > MaskKind::boolean)
    in["mask"] = Buffer(c.mask == MaskKind::additive ? c.dtype : c.acc(), added);
  const Values slopes = random.values(c.alibi == 2 ? c.B * c.Hq : c.Hq, 0.125);
  const std::vector<float> alibi(slopes.begin(), slopes.end());

  Truth rounded{{"alibi", Values(alibi.begin(), alibi.end())}};
  for (const auto& [name, buffer] : in) rounded[name] = buffer.values();
  const Reference reference{c, rounded, shown};
  const Truth truth = reference.forward();
  Buffers given;
  given["out"] = Buffer(c.dtype, truth.at("out")), given["lse"] = Buffer(c.acc(), truth.at("lse"));
  const Truth gradients = reference.backward(given.at("out").values(), given.at("lse").values()),
              weights = c.packed ? Truth{} : reference.weights();

  const Parallel team = c.threads == 1 ? Parallel{} : threads(c.threads);
  const Parallel odd = random.one_in(2) ? nested(3) : busy(3);
  const Call call{c, in, shown, alibi};
  for (const char* isa : isas) {
    force_isa(isa);
    const Buffers out = call.forward(team), grads = call.backward(given, team);
    expect_close(out, truth, "attention forward", c);
    expect_close(call.forward(odd), truth, "attention forward", c);
    expect_same_bits(call.forward(team), out, "second run", c);
    expect_close(grads, gradients, "attention backward", c);
    expect_close(call.backward(given, odd), gradients, "attention backward", c);
    expect_same_bits(call.backward(given, team), grads, "second run", c);
    if (!c.packed) expect_close(call.weights(team), weights, "attention weights", c);
    expect_unchanged(in, c);
    expect_unchanged(given, c);
    seen[isa] += c.packed ? 6 : 7;
  }
  const int n = (c.packed ? 6 : 7) * int(isas.size());
  calls += n;
  seen["attention"] += n, seen[kDTypeNames[int(c.dtype)]] += n, seen[kLayoutNames[c.layout]] += n;
  seen[kMaskNames[int(c.mask)]] += n;
  if (c.packed) seen["packed"] += n;
  if (!c.len_k.empty()) seen["lengths of keys"] += n;
  if (c.sinks) seen["sinks"] += n;
  if (c.want_dmask) seen["gradient of the mask"] += n;
}

}  // namespace

void check_attention(const std::vector<const char*>& isas) {
  Random random;
  for (int dtype = 0; dtype < 4; dtype++)
    for (int mask = 0; mask < 4; mask++) {
      const auto next = [&] { return random_case(DType(dtype), MaskKind(mask), random); };
      for (int i = 0; i < 16; i++) check(next(), isas, random);
      check(sized(next(), 1, 4, 1, 2, 1100, 64, 80, random), isas, random);   // keys in parts
      check(sized(next(), 1, 2, 1, 70, 600, 24, 40, random), isas, random);   // blocks of keys
      check(sized(next(), 2, 2, 2, 140, 70, 400, 17, random), isas, random);  // long products
      check(sized(next(), 2, 2, 1, 10, 20, 0, 0, random), isas, random);      // nothing to add
      check(sized(next(), 0, 2, 1, 10, 20, 8, 8, random), isas, random);
      check(sized(next(), 2, 0, 0, 10, 20, 8, 8, random), isas, random);
    }
}

}  // namespace seqkernels::test
