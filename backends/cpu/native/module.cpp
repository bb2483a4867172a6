// The extension module; setup.py builds it once per kind of CPU, under the name MODULE.
#include <pybind11/pybind11.h>

#include "kernels.h"
#include "program.h"

PYBIND11_MODULE(MODULE, module) {
    module.def("rms_norm", &dsv3::Recorded<&dsv3::rms_norm>::call);
    module.def("add_rms_norm", &dsv3::Recorded<&dsv3::add_rms_norm>::call);
    module.def("rope", &dsv3::Recorded<&dsv3::rope>::call);
    module.def("swiglu", &dsv3::Recorded<&dsv3::swiglu>::call);
    module.def("gemm", &dsv3::Recorded<&dsv3::gemm>::call);
    module.def("batched_gemm", &dsv3::Recorded<&dsv3::batched_gemm>::call);
    module.def("grouped_gemm", &dsv3::Recorded<&dsv3::grouped_gemm>::call);
    module.def("route", &dsv3::Recorded<&dsv3::route>::call);
    module.def("permute", &dsv3::Recorded<&dsv3::permute>::call);
    module.def("unpermute", &dsv3::Recorded<&dsv3::unpermute>::call);
    module.def("copy", &dsv3::Recorded<&dsv3::copy>::call);
    module.def("add", &dsv3::Recorded<&dsv3::add>::call);
    module.def("embedding", &dsv3::Recorded<&dsv3::embedding>::call);
    module.def("mla_decode_plan", &dsv3::Recorded<&dsv3::mla_decode_plan>::call);
    module.def("mla_cache_write", &dsv3::Recorded<&dsv3::mla_cache_write>::call);
    module.def("mla_decode", &dsv3::Recorded<&dsv3::mla_decode>::call);

    module.def("sample", &dsv3::sample);
    module.def("accept", &dsv3::accept);
    pybind11::class_<dsv3::Program>(module, "Program")
        .def(pybind11::init<>())
        .def("begin", [](dsv3::Program& program) { dsv3::recording = &program; })
        .def("end", [](dsv3::Program&) { dsv3::recording = nullptr; })
        .def("run", &dsv3::Program::run)
        .def("__len__", [](const dsv3::Program& program) { return program.calls.size(); });
}
