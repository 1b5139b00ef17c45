"""Translates the CUDA module's sources into C++ for the emulator: module.py SOURCE OUT

Launches become calls, dynamic shared memory a pointer, and the pieces of attention.cuh that are
written in PTX are replaced. Files of the fused TTT scans have an emulator of their own, and what
needs Hopper's instructions is left out.
"""
import glob
import os
import re
import sys

src, out = sys.argv[1] + '/', sys.argv[2] + '/'
skip={'attention_sm90.cu','attention_vjp_sm90.cu','cross_entropy_sm90.cu','lora_linear_sm90.cu','wgmma.cuh'}
def launches(s):
    while True:
        i=s.find('<<<')
        if i<0: return s
        # callee backwards
        j=i
        while s[j-1].isspace(): j-=1
        if s[j-1]=='>':
            depth=0
            while True:
                j-=1
                if s[j]=='>': depth+=1
                if s[j]=='<': depth-=1
                if depth==0: break
        while re.match(r'[A-Za-z0-9_:]',s[j-1]): j-=1
        callee=s[j:i].strip()
        k=s.index('>>>',i); config=s[i+3:k]
        a=s.index('(',k); depth=0; e=a
        while True:
            if s[e]=='(': depth+=1
            if s[e]==')': depth-=1
            e+=1
            if depth==0: break
        s=s[:j]+f'::emu::launch(::emu::Config({config}), [&]() {{ {callee}{s[a:e]}; }})'+s[e:]
def tr(s):
    s=s.replace('#ifdef __CUDACC__','#if 1')
    s=re.sub(r'extern __shared__ (?:__align__\(128\) )?([\w:]+) (\w+)\[\];',r'\1 *const \2 = ::emu::dynamic<\1>();',s)
    s=re.sub(r'#pragma unroll( \d+)?','',s)
    s=s.replace('cudaFuncSetAttribute(','cudaFuncSetAttribute((const void *)')
    return launches(s)
for f in sorted(glob.glob(src+'*')):
    b=os.path.basename(f)
    if b.startswith('ttt_l') or b.startswith('ttt_m') or b.startswith('ttt_t') or b.startswith('ttt_w') or b in skip or b in('meson.build','cuda.map','blas.cpp'): continue
    s=open(f).read()
    if b=='attention.cuh':
        def cut(a,e):
            i=s.index(a); return s[i:s.index(e,i)]
        s='''#pragma once
#include "kernel.hpp"
namespace ponder::cuda {
'''+cut("template <int D> struct Tile","__device__ inline uint32_t shared_address")+'''
inline void copy_piece(void *to, const void *from, bool there) { emu::thread->open.push_back({to, from, there}); }
inline void commit_copies() { emu::thread->groups.push_back(std::move(emu::thread->open)); emu::thread->open.clear(); }
template <int pending> void wait_copies() { auto &g = emu::thread->groups; while (g.size() > size_t(pending)) { for (auto &c : g.front()) { if (c.valid) std::memcpy(c.to, c.from, 16); else std::memset(c.to, 0, 16); } g.erase(g.begin()); } }
inline uint16_t element(const unsigned char (*all)[32], int m, int r, int c) { auto *p = emu::of_lane<const unsigned char *>(all, unsigned(8 * m + r)); uint16_t x; std::memcpy(&x, p + 2 * c, 2); return x; }
inline void load_matrices(uint32_t (&x)[4], const bf16 *row) { const auto *all = emu::exchange(reinterpret_cast<const unsigned char *>(row)); int g = int(emu::lane()) / 4, t = int(emu::lane()) % 4; for (int i = 0; i < 4; ++i) x[i] = element(all, i, g, 2 * t) | uint32_t(element(all, i, g, 2 * t + 1)) << 16; }
inline void load_transposed(uint32_t (&x)[4], const bf16 *row) { const auto *all = emu::exchange(reinterpret_cast<const unsigned char *>(row)); int g = int(emu::lane()) / 4, t = int(emu::lane()) % 4; for (int i = 0; i < 4; ++i) x[i] = element(all, i, 2 * t, g) | uint32_t(element(all, i, 2 * t + 1, g)) << 16; }
struct Factors { uint32_t a[4], b[2]; };
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { const auto *all = emu::exchange(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}});
 auto half = [](uint32_t x, int odd) { uint32_t u = odd ? x & 0xffff0000u : x << 16; float f; std::memcpy(&f, &u, 4); return f; }; int l = int(emu::lane());
 for (int e = 0; e < 4; ++e) { int row = l / 4 + 8 * (e / 2), col = 2 * (l % 4) + e % 2; float sum = c[e]; for (int k = 0; k < 16; ++k) { auto fa = emu::of_lane<Factors>(all, unsigned(row % 8 * 4 + k % 8 / 2)); auto fb = emu::of_lane<Factors>(all, unsigned(col * 4 + k % 8 / 2)); sum += half(fa.a[row / 8 + 2 * (k / 8)], k & 1) * half(fb.b[k / 8], k & 1); } c[e] = sum; } }
'''+cut("// Rows first .. first + ROWS","__device__ inline void load_matrices")+cut("// A first operand: rows","} // namespace")+"} // namespace ponder::cuda\n"
    if b=='launch.cuh':
        s='''#pragma once
#include "kernel.hpp"
namespace ponder::cuda {
template <class... P, class... A> void launch(const Run &, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, const A &...a) { emu::launch(emu::Config(grid, block, shared), [&]() { kernel(P(a)...); }); }
inline void wait_for_earlier() {}
} // namespace ponder::cuda
'''
    open(out+b,'w').write(tr(s))
