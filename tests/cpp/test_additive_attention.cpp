// Additive attention: forward and backward against plain loops in double precision.
#include "support.h"

namespace seqkernels::test {
namespace {

// Cases
// -------------------------------------------------------------------------------------------------------

enum Layout { kBySequences, kByTokens, kGaps, kLayouts };  // gaps: memory between the rows that is not ours
constexpr const char* kLayoutNames[] = {"by sequences", "by tokens", "rows with gaps"};
constexpr const char* kMaskNames[] = {"no mask", "boolean mask", "additive mask", "additive mask of acc"};

// Of queries and keys: beyond +-20 the kernel takes another way; opposite ones almost cancel in q + k.
enum Range { kNear0, kUpTo20, kQueriesBeyond, kKeysBeyond, kOpposite, kRanges };
constexpr const char* kRangeNames[] = {"near 0", "up to 20", "queries beyond 20", "keys beyond 20",
                                       "opposite queries and keys"};

struct Rows {  // [B, T, features] in memory
  int64_t b, t, size;
  int64_t at(int64_t seq, int64_t token) const { return seq * b + token * t; }
};

struct AdditiveCase {
  DType dtype;
  int64_t B, Tq, Tk, D, Dv;
  Layout layout;
  MaskKind mask;
  bool broadcast[3], turned;  // the mask along B, Tq, Tk; in memory: keys before queries
  bool weights, dweights, want_dmask;
  Range range;
  int threads;
  std::vector<int64_t> len_k;

  static constexpr double kBound = 256;  // of errors of f32 and f64, in eps: dS may cancel
  DType acc() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  DType rounding(const std::string& name) const { return name == "dmask" ? acc() : dtype; }
  int64_t keys(int64_t b) const { return len_k.empty() ? Tk : len_k[size_t(b)]; }
  Rows rows(int64_t tokens, int64_t features) const {
    const int64_t gap = layout == kGaps ? 3 : 0, width = features + gap, all = B * tokens;
    return {layout == kByTokens ? width : tokens * width, layout == kByTokens ? B * width : width,
            all ? all * width - gap : 0};
  }
  Rows q() const { return rows(Tq, D); }
  Rows k() const { return rows(Tk, D); }
  Rows v() const { return rows(Tk, Dv); }
  Rows out() const { return rows(Tq, Dv); }
  int64_t pair(int64_t b, int64_t i, int64_t j) const { return (b * Tq + i) * Tk + j; }
  int64_t pairs() const { return B * Tq * Tk; }

  int64_t mask_queries() const { return broadcast[1] ? 1 : Tq; }
  int64_t mask_keys() const { return broadcast[2] ? 1 : Tk; }
  int64_t mask_size() const { return (broadcast[0] ? 1 : B) * mask_queries() * mask_keys(); }
  int64_t mask_b() const { return broadcast[0] ? 0 : mask_queries() * mask_keys(); }
  int64_t mask_q() const { return broadcast[1] ? 0 : turned ? 1 : mask_keys(); }
  int64_t mask_k() const { return broadcast[2] ? 0 : turned ? mask_queries() : 1; }

  std::string text() const {
    char line[320];
    std::snprintf(line, sizeof line,
                  "additive attention %s %s B=%d Tq=%d Tk=%d D=%d Dv=%d %s broadcast=%d%d%d turned=%d "
                  "len_k=%d weights=%d dweights=%d dmask=%d %s threads=%d",
                  kDTypeNames[int(dtype)], kLayoutNames[layout], int(B), int(Tq), int(Tk), int(D), int(Dv),
                  kMaskNames[int(mask)], broadcast[0], broadcast[1], broadcast[2], turned, !len_k.empty(),
                  weights, dweights, want_dmask, kRangeNames[range], threads);
    return line;
  }
};

// Sizes, and what depends on them.
AdditiveCase sized(AdditiveCase c, int64_t B, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, Random& random) {
  c.B = B, c.Tq = Tq, c.Tk = Tk, c.D = D, c.Dv = Dv;
  // The dS of a query add up to 0. So do dq where all tanh are 0, and dw where they are 1 or -1: of many keys
  // nothing but rounding would be left.
  if (Tk > 8 * Tq) c.range = kNear0;
  c.len_k.clear();
  if (random.one_in(3))
    for (int64_t b = 0; b < B; b++)
      c.len_k.push_back(random.one_in(3) ? Tk : random.one_in(4) ? 0 : random.below(Tk + 1));
  return c;
}

AdditiveCase random_case(DType dtype, MaskKind mask, Random& random) {
  const std::vector<int64_t> features{0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 72};
  AdditiveCase c{};
  c.dtype = dtype, c.mask = mask, c.layout = Layout(random.below(kLayouts));
  for (bool& along : c.broadcast) along = random.one_in(3);
  c.turned = random.one_in(4);
  c.weights = random.one_in(2), c.dweights = random.one_in(2), c.want_dmask = random.one_in(2);
  c.range = Range(random.below(kRanges)), c.threads = int(1 + random.below(5));
  const int64_t B = random.of<int64_t>({1, 1, 2, 3}),
                Tq = random.of<int64_t>({0, 1, 2, 7, 8, 9, 31, 128, 129, 260}),
                Tk = random.of<int64_t>({0, 1, 3, 17, 63, 64, 65, 127, 128, 129, 300});
  const int64_t most = 1 + 400000 / (B * (Tq + 1) * (Tk + 1));  // features: keep the reference short
  const int64_t D = std::min(most, random.of(features)), Dv = std::min(most, random.of(features));
  return sized(c, B, Tq, Tk, D, Dv, random);
}

// Reference
// ---------------------------------------------------------------------------------------------------

struct Expected {
  Truth forward, backward;
};

// Between the rows of all outputs: NaN, as they were.
Expected expected(const AdditiveCase& c, const Truth& in, const std::vector<uint8_t>& shown) {
  Expected x;
  const auto zeros = [&](Truth& truth, const char* name, const Rows& rows, int64_t tokens, int64_t features) {
    Values& to = truth[name] = Values(size_t(rows.size), NAN);
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t t = 0; t < tokens; t++) std::fill_n(to.begin() + rows.at(b, t), features, 0.0);
    return to.data();
  };
  double *out = zeros(x.forward, "out", c.out(), c.Tq, c.Dv), *dq = zeros(x.backward, "dq", c.q(), c.Tq, c.D),
         *dk = zeros(x.backward, "dk", c.k(), c.Tk, c.D), *dv = zeros(x.backward, "dv", c.v(), c.Tk, c.Dv);
  Values weights(size_t(c.pairs())), dS(size_t(c.pairs()));
  std::vector<long double> dw(size_t(c.D));  // of all pairs: in double its rounding would be seen in f64
  const double *q = in.at("q").data(), *k = in.at("k").data(), *v = in.at("v").data(),
               *dout = in.at("dout").data(), *w = in.at("w").data();

  for (int64_t b = 0; b < c.B; b++)
    for (int64_t i = 0; i < c.Tq; i++) {
      const int64_t keys = c.keys(b), of_q = c.q().at(b, i), of_out = c.out().at(b, i);
      double *P = weights.data() + c.pair(b, i, 0), *ds = dS.data() + c.pair(b, i, 0);
      Values tanhs, scores, dP;
      double top = -INFINITY;
      long double sum = 0, delta = 0;
      for (int64_t j = 0; j < keys; j++) {
        const int64_t at = b * c.mask_b() + i * c.mask_q() + j * c.mask_k();
        double s = 0;
        for (int64_t h = 0; h < c.D; h++) {
          tanhs.push_back(std::tanh(q[of_q + h] + k[c.k().at(b, j) + h]));
          s += w[h] * tanhs.back();
        }
        if (c.mask == MaskKind::boolean && !shown[size_t(at)]) s = -INFINITY;
        if (c.mask > MaskKind::boolean) s += in.at("mask")[size_t(at)];
        scores.push_back(s), top = std::max(top, s);
      }
      if (top == -INFINITY) continue;
      for (const double s : scores) sum += std::exp(s - top);
      for (int64_t j = 0; j < keys; j++) {
        P[j] = double(std::exp(scores[size_t(j)] - top) / sum);
        dP.push_back(c.dweights ? in.at("dweights")[size_t(c.pair(b, i, j))] : 0);
        for (int64_t d = 0, at = c.v().at(b, j); d < c.Dv; d++) {
          out[of_out + d] += P[j] * v[at + d];
          dv[at + d] += P[j] * dout[of_out + d];
          dP.back() += dout[of_out + d] * v[at + d];
        }
        delta += P[j] * dP.back();
      }
      for (int64_t j = 0; j < keys; j++) {
        ds[j] = double(P[j] * (dP[size_t(j)] - delta));
        for (int64_t h = 0; h < c.D; h++) {
          const double t = tanhs[size_t(j * c.D + h)], g = ds[j] * w[h] * (1 - t * t);
          dq[of_q + h] += g, dk[c.k().at(b, j) + h] += g, dw[size_t(h)] += ds[j] * t;
        }
      }
    }
  x.backward["dw"].assign(dw.begin(), dw.end());
  if (c.weights) x.forward["weights"] = weights;
  if (c.want_dmask) x.backward["dmask"] = dS;
  return x;
}

// Kernels
// -----------------------------------------------------------------------------------------------------

struct Call {
  const AdditiveCase& c;
  const Buffers& in;
  const std::vector<uint8_t>& shown;

  Heads<const void*> read(const char* name, const Rows& rows) const {
    return {pointer(in, name), rows.b, 0, rows.t};
  }
  Heads<void*> make(Buffers& out, const char* name, const Rows& rows) const {
    return {make(out, name, c.dtype, rows.size), rows.b, 0, rows.t};
  }
  void* make(Buffers& out, const char* name, DType type, int64_t n) const {
    return (out[name] = Buffer(type, n)).data();
  }
  template <class Params>
  Params params(const Parallel& parallel) const {
    Params p;
    p.dtype = c.dtype;
    p.B = c.B, p.Hq = p.Hk = 1, p.Tq = c.Tq, p.Tk = c.Tk, p.D = c.D, p.Dv = c.Dv;
    p.q = read("q", c.q()), p.k = read("k", c.k()), p.v = read("v", c.v()), p.w = pointer(in, "w");
    if (!c.len_k.empty()) p.len_k = c.len_k.data();
    if ((p.mask_kind = c.mask) != MaskKind::none) {
      p.mask = c.mask == MaskKind::boolean ? shown.data() : pointer(in, "mask");
      p.mask_b = c.mask_b(), p.mask_q = c.mask_q(), p.mask_k = c.mask_k();
    }
    p.parallel = parallel;
    return p;
  }

  Buffers forward(const Parallel& parallel) const {
    auto p = params<AdditiveAttentionFwdParams>(parallel);
    Buffers out;
    p.out = make(out, "out", c.out());
    if (c.weights) p.weights = make(out, "weights", c.dtype, c.pairs());
    additive_attention_fwd(p);
    return out;
  }
  Buffers backward(const Parallel& parallel) const {
    auto p = params<AdditiveAttentionBwdParams>(parallel);
    p.dout = read("dout", c.out()), p.dweights = pointer(in, "dweights");
    Buffers out;
    p.dq = make(out, "dq", c.q()), p.dk = make(out, "dk", c.k()), p.dv = make(out, "dv", c.v());
    p.dw = make(out, "dw", c.dtype, c.D);
    if (c.want_dmask) p.dmask = make(out, "dmask", c.acc(), c.pairs());
    additive_attention_bwd(p);
    return out;
  }
};

// Checks
// ------------------------------------------------------------------------------------------------------

void check(const AdditiveCase& c, const std::vector<const char*>& isas, Random& random) {
  Buffers in;
  const auto all = [&](int64_t) { return c.Tq; };
  const auto there = [&](int64_t b) { return c.keys(b); };
  // What lies between the rows, and keys beyond the length, are not to be read.
  const auto input = [&](const char* name, const Rows& rows, const auto& tokens, int64_t features,
                         const auto& row) {
    Values x(size_t(rows.size), NAN);
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t t = 0; t < tokens(b); t++) {
        const Values some = row(features);
        std::copy(some.begin(), some.end(), x.begin() + rows.at(b, t));
      }
    in[name] = Buffer(c.dtype, x);
  };
  const auto small = [&](int64_t n) { return random.values(n, 1); };
  const Values offsets = random.values(c.D, 15);
  const auto ranged = [&](Range beyond, double sign) {
    return [&, beyond, sign](int64_t n) {
      if (c.range == beyond && random.one_in(50)) return random.values(n, random.of<double>({40, 30000}));
      Values x = random.values(n, c.range == kUpTo20 ? 20 : c.range == kOpposite ? 0x1p-13 : 2);
      if (c.range == kUpTo20 && n) x[size_t(random.below(n))] = random.of<double>({-20, 20});
      for (size_t h = 0; c.range == kOpposite && h < x.size(); h++) x[h] += sign * offsets[h];
      return x;
    };
  };
  input("q", c.q(), all, c.D, ranged(kQueriesBeyond, 1));
  input("k", c.k(), there, c.D, ranged(kKeysBeyond, -1));
  input("v", c.v(), there, c.Dv, small), input("dout", c.out(), all, c.Dv, small);
  // Opposite ones leave small tanh, whose errors are to be seen; 16 bits leave larger ones.
  in["w"] = Buffer(c.dtype, random.values(c.D, c.range == kOpposite && kBytes[int(c.dtype)] > 2 ? 1000 : 1));
  if (c.dweights) {
    Values x = random.values(c.pairs(), 1);
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t i = 0; i < c.Tq; i++)
        std::fill(x.begin() + c.pair(b, i, c.keys(b)), x.begin() + c.pair(b, i, c.Tk), NAN);
    in["dweights"] = Buffer(c.dtype, x);
  }
  const auto [shown, added] = random_mask(c.mask, c.mask_size(), random);
  if (c.mask > MaskKind::boolean)
    in["mask"] = Buffer(c.mask == MaskKind::additive ? c.dtype : c.acc(), added);

  Truth rounded;
  for (const auto& [name, buffer] : in) rounded[name] = buffer.values();
  const auto [truth, gradients] = expected(c, rounded, shown);

  const Parallel team = c.threads == 1 ? Parallel{} : threads(c.threads);
  const Parallel odd = random.one_in(2) ? nested(c.threads) : busy(c.threads);
  const Call call{c, in, shown};
  for (const char* isa : isas) {
    force_isa(isa);
    const Buffers out = call.forward(team), grads = call.backward(team);
    expect_close(out, truth, "additive attention forward", c);
    expect_close(grads, gradients, "additive attention backward", c);
    expect_same_bits(call.forward(team), out, "second run", c);
    expect_same_bits(call.backward(team), grads, "second run", c);
    expect_same_bits(call.forward(odd), out, "as many threads", c);
    expect_same_bits(call.backward(odd), grads, "as many threads", c);
    expect_unchanged(in, c);
    seen[isa] += 6;
  }
  const int n = 6 * int(isas.size());
  calls += n;
  seen["additive attention"] += n, seen[kDTypeNames[int(c.dtype)]] += n, seen[kLayoutNames[c.layout]] += n;
  seen[kMaskNames[int(c.mask)]] += n, seen[kRangeNames[c.range]] += n;
  if (!c.len_k.empty()) seen["lengths of keys"] += n;
  if (c.weights) seen["weights"] += n;
  if (c.dweights) seen["gradient of the weights"] += n;
  if (c.want_dmask) seen["gradient of the mask"] += n;
}

}  // namespace

void check_additive_attention(const std::vector<const char*>& isas) {
  Random random;
  for (int dtype = 0; dtype < 4; dtype++)
    for (int mask = 0; mask < 4; mask++) {
      const auto next = [&] { return random_case(DType(dtype), MaskKind(mask), random); };
      for (int i = 0; i < 16; i++) check(next(), isas, random);
      check(sized(next(), 1, 2, 1100, 33, 80, random), isas, random);   // few queries, keys in parts
      check(sized(next(), 1, 129, 600, 7, 17, random), isas, random);   // tiles and parts
      check(sized(next(), 2, 300, 70, 16, 9, random), isas, random);    // in backward: parts of the tiles
      check(sized(next(), 1, 100, 3000, 4, 3, random), isas, random);   // tiles as short as the keys ask
      check(sized(next(), 2, 20, 30, 400, 300, random), isas, random);  // long rows
      check(sized(next(), 2, 10, 20, 0, 0, random), isas, random);      // nothing to add
      check(sized(next(), 0, 10, 20, 8, 8, random), isas, random);
      if (mask == dtype)
        check(sized(next(), 1, 10, 33000, 5, 2, random), isas, random);  // the shortest tiles
    }
}

}  // namespace seqkernels::test
