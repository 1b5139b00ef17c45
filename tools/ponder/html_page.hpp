// The fixed parts of the page that `ponder run --html` writes: style and behaviour.
#pragma once

namespace tool {

// Colour-blind safe: blue = easier, orange = harder, four strengths each. Text keeps a contrast
// of at least 4.5 on every background in both themes.
inline constexpr const char *page_style = R"css(
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#57606a;--line:#d0d7de;--card:#f6f8fa;
--skip:#6e7781;--good:#0b62c4;--bad:#b35900;
--e1:#e3f0ff;--e2:#c2dfff;--e3:#93c5fd;--e4:#5fa8f5;
--h1:#fff1dd;--h2:#ffdcae;--h3:#ffbf73;--h4:#f59b3d}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9aa4af;--line:#30363d;
--card:#161b22;--skip:#8b949e;--good:#6cb1ff;--bad:#f0a24a;
--e1:#10233b;--e2:#123257;--e3:#13457e;--e4:#165aa8;
--h1:#2e2112;--h2:#482e10;--h3:#653d0c;--h4:#854d06}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1.5rem 1.25rem 5rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p{margin:.3rem 0 .8rem;max-width:48rem}.soft{color:var(--soft)}
.cards{display:grid;
grid-template-columns:repeat(auto-fit,minmax(9.8rem,1fr));gap:.75rem;margin:1.2rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}
.card b{display:block;font-size:1.3rem;line-height:1.3}
.card small{color:var(--soft);font-size:.85rem}.good{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--good);outline-offset:2px}
svg{display:block}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
svg .k{font-size:9px;text-anchor:middle}svg .grid{stroke:var(--line)}
svg .b{fill:var(--good)}svg .w{fill:var(--bad)}svg .n{fill:var(--skip)}
svg .s{stroke:var(--fg);stroke-width:2}svg .gate{fill:var(--fg)}svg .limit{stroke:var(--soft)}
svg .skip{fill:none;stroke:var(--skip);stroke-width:2;stroke-dasharray:5 3}
svg .adapted{fill:none;stroke:var(--good);stroke-width:2.5}
svg .raw{fill:none;stroke:var(--good);opacity:.4}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0;font-size:.9rem;color:var(--soft)}
.key span{white-space:nowrap}.sw{display:inline-block;width:1.6em;height:.9em;vertical-align:-.1em;
border:1px solid var(--line);margin-right:.15em}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .9rem .2rem 0;text-align:right;
font-variant-numeric:tabular-nums}th{font-weight:600;color:var(--soft)}
td:first-child,th:first-child{text-align:left}
.chunk{margin:1rem 0 .2rem;font-size:.85rem;color:var(--soft)}.chunk b{color:var(--fg)}
pre{margin:0;padding:.6rem .8rem;border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
i{font-style:normal;border-radius:2px}i:hover,i.on{outline:2px solid var(--fg);outline-offset:-1px}
i u{text-decoration:none;color:var(--soft);font-size:.85em}
.file{display:inline-block;padding:0 .5em;border-radius:4px;background:var(--card);
border:1px solid var(--line);font-weight:600}
.e1{background:var(--e1)}.e2{background:var(--e2)}.e3{background:var(--e3)}.e4{background:var(--e4)}
.h1{background:var(--h1)}.h2{background:var(--h2)}.h3{background:var(--h3)}.h4{background:var(--h4)}
#tip{position:fixed;left:0;right:0;bottom:0;padding:.55rem 1.25rem;background:var(--card);
border-top:1px solid var(--line);font-size:.95rem;min-height:2.6rem}
#tip code{font:13px ui-monospace,Menlo,Consolas,monospace;background:var(--bg);padding:.1em .35em;
border:1px solid var(--line);border-radius:4px}
)css";

// Colours and charts need no script; it only shows the numbers of the token pointed at.
inline constexpr const char *page_script = R"js(
(function(){
var tip=document.getElementById('tip'),last=null,idle=tip.textContent;
function show(t){
 if(last)last.classList.remove('on');
 last=t;if(!t){tip.textContent=idle;return}
 t.classList.add('on');
 var n=(t.dataset.l||'').split(' '),code=document.createElement('code');
 code.textContent=t.textContent.replace(/\n/g,'').slice(0,60)||' ';
 tip.textContent='';tip.appendChild(code);
 var s=n[0],a=n[1],text;
 if(!t.dataset.l)text=' first token of its chunk: nothing predicts it';
 else if(s==='-')text=' adapted '+a+' nats';
 else{var g=(s-a);text=' SKIP '+s+' \u2192 adapted '+a+' nats: '+Math.abs(g).toFixed(2)+
  (g>=0?' easier':' harder')+', probability '+pc(s)+' \u2192 '+pc(a)}
 tip.appendChild(document.createTextNode(text));
}
function pc(x){var p=100*Math.exp(-x);return(p<0.1?p.toExponential(0):p.toFixed(1))+' %'}
document.addEventListener('mouseover',function(e){var t=e.target.closest('pre i');if(t)show(t)});
document.addEventListener('click',function(e){var t=e.target.closest('pre i');if(t)show(t)});
document.addEventListener('focusin',function(e){
 if(e.target.tagName==='PRE')show(e.target.querySelector('i'))});
document.addEventListener('keydown',function(e){
 var p=document.activeElement;if(!p||p.tagName!=='PRE')return;
 var d=e.key==='ArrowRight'?1:e.key==='ArrowLeft'?-1:0;if(!d)return;
 var all=p.querySelectorAll('i'),at=Array.prototype.indexOf.call(all,last);
 if(at<0)at=d>0?-1:all.length;
 var t=all[at+d];if(t){show(t);t.scrollIntoView({block:'nearest'});e.preventDefault()}});
})();
)js";

} // namespace tool
