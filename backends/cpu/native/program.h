// A recorded program: kernels with their arguments, run again in order without Python between them.
//
// What a call was given as a number is frozen; what lies behind an address is read anew.
#pragma once

#include <functional>
#include <vector>

namespace dsv3 {

struct Program {
    std::vector<std::function<void()>> calls;

    void run() const {
        for (const auto& call : calls) call();
    }
};

// Where kernels that this thread calls are written down, besides being run; null where they are not.
inline thread_local Program* recording = nullptr;

template <auto kernel>
struct Recorded;

template <class... Arguments, void (*kernel)(Arguments...)>
struct Recorded<kernel> {
    static void call(Arguments... arguments) {
        kernel(arguments...);
        if (recording) recording->calls.push_back([=] { kernel(arguments...); });
    }
};

}  // namespace dsv3
