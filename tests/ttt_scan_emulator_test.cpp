// The CUDA scans on the emulator (tests/emulator): what they compute, where there is no GPU.
// `ninja tests/ttt_scan_emulator_test`, which the other tests do not wait for. x86-64 only.
//     ttt_scan_emulator_test [forward] [part of cases' names]
#include "ttt_scan_cases.hpp"

#include <cstdlib>

int main(int argc, char **argv) {
    using ponder::DType;
    using ponder::test::ScanCase;
    const bool backward = argc < 2 || std::string(argv[1]) != "forward";
    std::vector<ScanCase> cases;
    for (const DType type : {DType::f32, DType::bf16}) {
        cases.push_back({1, 48, 2, 64, 16, type});
        cases.push_back({2, 37, 1, 64, 16, type, true, false, 0.1, 0, -1});
        cases.push_back({1, 50, 2, 32, 16, type, false, false, 0, 0.5});
        cases.push_back({1, 7, 1, 32, 16, type, true});
        cases.push_back({1, 33, 1, 128, 16, type});
        cases.push_back({1, 130, 1, 64, 64, type});
        cases.push_back({1, 100, 1, 32, 64, type, true, false, 0.1, 0.5});
        cases.push_back({1, 70, 1, 128, 64, type});
        cases.push_back({1, 33, 2, 256, 16, type});
        cases.push_back({2, 37, 1, 256, 16, type, true, false, 0.1, 0, -1});
        cases.push_back({1, 50, 1, 256, 16, type, false, false, 0, 0.5});
        cases.push_back({1, 7, 2, 256, 16, type, true, false, 0, 0.5});
        cases.push_back({1, 300, 1, 256, 16, type, false, false, 0.1, 0, 0, false});
        cases.push_back({2, 272, 1, 256, 16, type, true, false, 0, 0.5, -2, true, 4});
        cases.push_back({1, 130, 2, 256, 64, type});
        cases.push_back({2, 100, 1, 256, 64, type, true, false, 0.1, 0.5, -2});
        cases.push_back({1, 20, 1, 256, 64, type, false, false, 0, 0.5, 0, false});
        cases.push_back({1, 300, 1, 32, 16, type, false, false, 0, 0, 0, false});
        cases.push_back({1, 90, 1, 64, 16, type, false, false, 0, 0, 0, true, 4});
        cases.push_back({1, 90, 1, 64, 16, type, true, false, 0, 0, -1, true, 4, 1});
        cases.push_back({1, 90, 1, 64, 16, type, true, false, 0, 0, -1, true, 4, 3});
        for (const int64_t t : {1, 25, 50, 300})
            for (const int split : {1, 4}) {
                ScanCase mlp{t == 50 ? 2 : 1, t, t < 25 ? 4 : t == 50 ? 2 : 1, 64, 16, type};
                mlp.mlp = true;
                mlp.losses = t != 300;
                mlp.lr_scale = 10;
                mlp.kernel = split;
                cases.push_back(mlp);
            }
        for (const int64_t t : {1, 25, 50, 300}) {
            ScanCase mlp{t == 50 ? 2 : 1, t, t == 25 ? 2 : 1, 128, 16, type};
            mlp.mlp = true;
            mlp.losses = t != 300;
            mlp.lr_scale = 10;
            mlp.kernel = 8;
            cases.push_back(mlp);
        }
        for (const int64_t t : {1, 40, 64, 100, 145, 300}) {
            ScanCase mlp{t == 40 ? 2 : 1, t, t == 100 ? 2 : 1, 64, 64, type};
            mlp.mlp = true;
            mlp.losses = t != 300;
            mlp.lr_scale = 10;
            mlp.kernel = 4;
            cases.push_back(mlp);
        }
    }
    for (const int kernel : {4, 5}) {
        ScanCase c{1, 48, 2, 64, 16, DType::bf16};
        c.kernel = kernel;
        cases.push_back(c);
        c.t = 1;
        cases.push_back(c);
        c = {2, 37, 1, 64, 16, DType::bf16, true, false, 0.1, 0, -1};
        c.kernel = kernel;
        cases.push_back(c);
        c = {1, 150, 1, 64, 16, DType::bf16, false, false, 0, 0.5};
        c.kernel = kernel;
        cases.push_back(c);
        c = {1, 300, 1, 64, 16, DType::bf16, true, false, 0, 0, 0, true, 4};
        c.kernel = kernel;
        cases.push_back(c);
        c.losses = false;
        c.t = 23;
        cases.push_back(c);
    }
    const std::string part = argc > 1 ? argv[argc - 1] : "";
    if (part != "" && part != "forward")
        std::erase_if(cases,
                      [&](const ScanCase &c) { return c.name().find(part) == std::string::npos; });
    return ponder::test::check_scans(cases, backward) ? 0 : 1;
}
