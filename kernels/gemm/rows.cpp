// RowSchedule.run (cpu.py) without Python around every call: a decoding step makes one call for each linear layer, and
// at one row the product itself takes tens of microseconds. No arithmetic here: rows are padded, cut and handed on to the
// product that was certified.

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

// (y, x, bias, packed weight): writes the product of x's rows into y's rows.
using Product = void(at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&);

// One entry per schedule, appended while layers are packed and never changed: `padded` as in RowSchedule. The shape is
// kept to refuse a graph that was traced with other numbers.
struct Schedule {
  c10::TypedOperatorHandle<Product> product;
  int64_t n, k;
  std::vector<int64_t> padded;
};

std::vector<Schedule>& schedules() {
  static std::vector<Schedule> all;
  return all;
}

int64_t add_schedule(const std::string& product, int64_t n, int64_t k, at::IntArrayRef padded) {
  TORCH_CHECK(!padded.empty(), "a schedule needs at least one certified row count");
  auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(product.c_str(), "").typed<Product>();
  schedules().push_back({handle, n, k, padded.vec()});
  return static_cast<int64_t>(schedules().size()) - 1;
}

void run(const Schedule& schedule, at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& bias,
         const at::Tensor& weight) {
  const int64_t rows = x.size(0);
  if (rows == 0) return;
  const int64_t padded = schedule.padded[rows - 1];
  if (padded == rows) {
    schedule.product.call(y, x, bias, weight);
    return;
  }
  const at::Tensor real = x.contiguous();
  at::Tensor wide = at::empty({padded, x.size(1)}, x.options());
  at::Tensor out = at::empty({padded, y.size(1)}, y.options());
  std::memcpy(wide.data_ptr(), real.const_data_ptr(), real.nbytes());
  std::memset(static_cast<char*>(wide.data_ptr()) + real.nbytes(), 0, wide.nbytes() - real.nbytes());
  schedule.product.call(out, wide, bias, weight);
  std::memcpy(y.data_ptr(), out.const_data_ptr(), y.nbytes());
}

void cpu_linear(at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& bias, const at::Tensor& weight,
                int64_t number) {
  const Schedule& schedule = schedules().at(number);
  TORCH_CHECK(y.size(1) == schedule.n && x.size(1) == schedule.k, "schedule ", number, " is of weights [", schedule.n,
              ", ", schedule.k, "], not [", y.size(1), ", ", x.size(1), "]");
  TORCH_CHECK(y.is_contiguous() && y.size(0) == x.size(0) && y.scalar_type() == x.scalar_type(),
              "y must be contiguous, with the rows and the type of x");
  const int64_t rows = x.size(0), tile = static_cast<int64_t>(schedule.padded.size());
  if (rows <= tile) {
    run(schedule, y, x, bias, weight);
    return;
  }
  for (int64_t start = 0; start < rows; start += tile) {
    const int64_t length = std::min(tile, rows - start);
    at::Tensor part = y.narrow(0, start, length);
    run(schedule, part, x.narrow(0, start, length), bias, weight);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_deterministic, library) {
  library.def("add_schedule(str product, int n, int k, int[] padded) -> int", add_schedule);
  library.def("cpu_linear(Tensor! y, Tensor x, Tensor? bias, Tensor weight, int schedule) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_deterministic, CPU, library) {
  library.impl("cpu_linear", cpu_linear);
}
