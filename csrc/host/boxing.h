// From the dispatcher's stack of values to the arguments of a C++ function, and back.
//
// torch's own TORCH_BOX takes one C++ argument for each of the schema's. Here a struct may stand for several: its
// kFields, all of its fields in the schema's order, are read one after another, as everything in braces is.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace torchce::host {

template <class T>
concept StructOfArguments = requires { T::kFields; };

// How many of a schema's arguments stand for one of C++ type T.
template <class T>
constexpr uint64_t kArgumentsOf = 1;
template <StructOfArguments T>
constexpr uint64_t kArgumentsOf<T> = std::tuple_size_v<std::remove_cvref_t<decltype(T::kFields)>>;

// Takes the next argument of type T off the stack.
template <class T>
T take(StableIValue*& stack) {
  if constexpr (StructOfArguments<T>) {
    const auto take_fields = [&](auto... field) {
      return T{take<std::remove_cvref_t<decltype(std::declval<T&>().*field)>>(stack)...};
    };
    return std::apply(take_fields, T::kFields);
  } else if constexpr (std::is_same_v<T, Reduction>) {
    return reduction_of(stable_cast<int64_t>(*stack++));
  } else if constexpr (std::is_same_v<T, torchce::divergence::Kind>) {
    return kind_of(stable_cast<int64_t>(*stack++));
  } else {
    return stable_cast<T>(*stack++);
  }
}

template <class T>
struct Results {
  static constexpr uint64_t kCount = 1;
  static void put(StableIValue* stack, const T& result) { *stack = stable_cast<StableIValue>(result); }
};
template <class... Parts>
struct Results<std::tuple<Parts...>> {
  static constexpr uint64_t kCount = sizeof...(Parts);
  static void put(StableIValue* stack, const std::tuple<Parts...>& results) {
    std::apply([&](const auto&... part) { ((*stack++ = stable_cast<StableIValue>(part)), ...); }, results);
  }
};

template <class Result, class... Parameters>
Result call_with_stack(Result (*function)(Parameters...), StableIValue* stack, uint64_t arguments) {
  constexpr uint64_t kArguments = (kArgumentsOf<Parameters> + ...);
  check(arguments == kArguments, "the schema has ", arguments, " arguments, its function ", kArguments);
  std::tuple<Parameters...> taken{take<Parameters>(stack)...};
  return std::apply(function, std::move(taken));
}

// `function` as the dispatcher calls it: it finds the arguments on a stack and leaves the results there.
template <auto function>
void box(StableIValue* stack, uint64_t arguments, uint64_t results) {
  using Put = Results<decltype(call_with_stack(function, stack, arguments))>;
  check(results == Put::kCount, "the schema has ", results, " results, its function ", Put::kCount);
  Put::put(stack, call_with_stack(function, stack, arguments));
}

// `function` for a schema without a result: what it returns is an argument that it has written to.
template <auto function>
void box_without_result(StableIValue* stack, uint64_t arguments, uint64_t results) {
  check(results == 0, "the schema has ", results, " results, its function none");
  call_with_stack(function, stack, arguments);
}

}  // namespace torchce::host
