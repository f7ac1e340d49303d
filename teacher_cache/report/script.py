"""What the report's page has of its own: the style of tokens and cards, and the script that shows alternatives.

The script finds a token's row (see `browser._rows`) by `data-s` of its paragraph and its own `data-i`. All that
came out of samples or vocabularies is set as text.
"""

from __future__ import annotations

STYLE = """
:root { --heat: 245 158 11; --bubble: #eef2f7; }
@media (prefers-color-scheme: dark) { :root { --heat: 251 146 60; --bubble: #111827; } }
.sample { margin-top: 1rem; scroll-margin-top: 1rem; overflow: visible; content-visibility: auto;
  contain-intrinsic-size: auto 20rem; }
.sample:target { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.sample header { display: flex; flex-wrap: wrap; gap: .4rem; align-items: baseline; margin-bottom: .7rem; }
.sample h3 { margin: 0 .4rem 0 0; overflow-wrap: anywhere; }
.badge { font-size: .75rem; color: var(--soft); border: 1px solid var(--line); border-radius: 1rem;
  padding: 0 .55rem; }
.body { display: flex; gap: 1.2rem; align-items: flex-start; }
.pictures { flex: 0 0 13rem; }
.pictures img { width: 100%; max-height: 16rem; object-fit: contain; border-radius: .5rem; background: var(--page); }
.talk { flex: 1; min-width: 0; display: grid; gap: .6rem; }
.asked { justify-self: start; max-width: 46rem; background: var(--bubble); border-radius: .2rem .8rem .8rem .8rem;
  padding: .45rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer { border-left: 3px solid var(--line); padding-left: .8rem; min-width: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.answer.chosen { border-color: var(--good); } .answer.rejected { border-color: var(--bad); }
.who { white-space: normal; } .sides { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 1rem; }
.halves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.halves + .card { margin-top: 1rem; } .halves .card { margin-top: 0; }
.tokens { margin: 0; line-height: 2; }
.t { background: rgb(var(--heat) / calc(var(--e) * .75)); border-bottom: 2px solid transparent; border-radius: .2rem;
  padding: .15rem 0; }
.tokens .t { cursor: pointer; } .t.off { border-bottom: 2px dotted var(--bad); }
.t.special { font-size: .75em; color: var(--soft); padding: .25rem .15rem; margin-left: .15rem; }
.t.part, .t.name { font-size: .85em; color: var(--soft); }
.tokens .t:hover, .t.on, .t:focus { outline: 2px solid var(--accent); }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin-bottom: .4rem; }
.scale { width: 14rem; } .ramp { height: .8rem; border-radius: .3rem; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / .75)); }
.ticks { display: flex; justify-content: space-between; font-size: .75rem; color: var(--soft); }
.pop { position: fixed; z-index: 9; width: min(22rem, calc(100vw - 1rem)); max-height: 70vh; overflow-y: auto;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem;
  box-shadow: 0 .5rem 1.6rem rgb(0 0 0 / .25); font-size: .88rem; }
.pop b { font-size: 1.05rem; overflow-wrap: anywhere; } .pop .row { display: grid; gap: .5rem; align-items: center;
  grid-template-columns: minmax(5rem, 9rem) 1fr 4rem; padding: .06rem 0; font-variant-numeric: tabular-nums; }
.pop .row span { overflow-wrap: anywhere; white-space: pre-wrap; } .pop .row span:last-child { text-align: right; }
.pop .row i { display: block; height: .6rem; background: var(--accent); opacity: .55; border-radius: .15rem;
  min-width: 1px; }
.pop .row.this { font-weight: 700; } .pop .row.this i { opacity: 1; }
.rankings { grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
.rankings table { margin-top: .5rem; } .rankings td { padding: .3rem 0; }
.rankings td:first-child { overflow-wrap: anywhere; padding-right: .6rem; }
@media (max-width: 40rem) {
  .body { flex-direction: column; } .pictures { flex: none; width: 100%; } .sides { grid-auto-flow: row; }
  .pop { left: .5rem !important; right: .5rem; top: auto !important; bottom: .5rem; width: auto; max-height: 55vh; }
}
"""

SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent);
const make=(tag,text,name)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;
if(name)e.className=name;return e};
const digits=x=>x>=0.0001||x===0?x.toFixed(4):x.toExponential(1);
const name=id=>data.names[id];
const pop=make('div',undefined,'pop');pop.id='pop';pop.setAttribute('role','tooltip');pop.hidden=true;
document.body.append(pop);
let current=null,pinned=false;
function line(id,p,target){const r=make('div',undefined,id===target?'row this':'row'),bar=make('i');
bar.style.width=(100*p).toFixed(2)+'%';const cell=make('span');cell.append(bar);
r.append(make('span',name(id)),cell,make('span',digits(p)));return r}
function show(token){if(token===current)return;hide();current=token;token.classList.add('on');
const row=data.sequences[token.parentNode.dataset.s][token.dataset.i];
const [target,logProb,entropy,tail,ids,probs,more,moreMass,drawn,times,draws]=row;
pop.replaceChildren(make('b',name(target)),make('small','p '+digits(Math.exp(logProb))+' \\u00b7 log p '+
logProb.toFixed(3)+' \\u00b7 entropy '+entropy.toFixed(3)+' nats'));
ids.forEach((id,i)=>pop.append(line(id,probs[i],target)));
if(!ids.includes(target))pop.append(line(target,Math.exp(logProb),target));
if(more)pop.append(make('small',more.toLocaleString('en')+' more in the head: '+digits(moreMass)));
pop.append(make('small','outside the head: '+digits(tail)));
if(draws)pop.append(make('small','drawn from there: '+drawn.map((id,i)=>name(id)+(times[i]>1?' \\u00d7'+times[i]:''))
.join(', ')+(times.reduce((a,b)=>a+b,0)<draws?' \\u2026':'')));
pop.hidden=false;token.setAttribute('aria-describedby','pop');place(token)}
function place(token){const t=token.getClientRects()[0],w=pop.offsetWidth,h=pop.offsetHeight;
const below=t.bottom+6+h<innerHeight||t.top<h+6;
pop.style.left=Math.max(8,Math.min(t.left,innerWidth-w-8))+'px';
pop.style.top=Math.max(8,below?Math.min(t.bottom+6,innerHeight-h-8):t.top-h-6)+'px'}
function hide(){if(!current)return;current.classList.remove('on');current.removeAttribute('aria-describedby');
current=null;pinned=false;pop.hidden=true}
const token=e=>e.target.closest&&e.target.closest('.tokens .t');
document.addEventListener('pointerover',e=>{const t=token(e);if(t&&!pinned)show(t);
else if(!t&&!pinned&&!e.target.closest('.pop'))hide()});
document.addEventListener('click',e=>{const t=token(e);if(t){show(t);pinned=true}
else if(!e.target.closest('.pop'))hide()});
document.addEventListener('focusin',e=>{const t=token(e);if(t){pinned=false;show(t)}});
document.addEventListener('focusout',()=>{if(!pinned)hide()});
addEventListener('scroll',()=>{if(current)place(current)},{passive:true});
document.addEventListener('keydown',e=>{if(e.key==='Escape')hide();const t=token(e);
const step={ArrowRight:1,ArrowLeft:-1}[e.key];if(!t||!step)return;
const all=[...t.closest('.sample').querySelectorAll('.tokens .t')],next=all[all.indexOf(t)+step];
if(next){e.preventDefault();next.focus()}});
document.querySelectorAll('.tokens').forEach(p=>p.querySelectorAll('.t').forEach((t,i)=>{
t.removeAttribute('title');t.tabIndex=i?-1:0}));
const pick=id=>document.getElementById(id),cards=[...document.querySelectorAll('.sample')];
function filter(){const why=pick('why').value,source=pick('source')?pick('source').value:'';
const words=pick('find').value.toLowerCase();let shown=0;hide();
cards.forEach(c=>{const fits=(!why||c.dataset.why.split(' ').includes(why))&&(!source||c.dataset.source===source)&&
(!words||c.textContent.toLowerCase().includes(words));c.hidden=!fits;shown+=fits});
pick('count').textContent=shown+' of '+cards.length+' samples'}
['why','source','find'].forEach(id=>{if(pick(id))pick(id).addEventListener('input',filter)});
addEventListener('hashchange',()=>{pick('why').value=pick('find').value='';if(pick('source'))pick('source').value='';
filter();const c=document.getElementById(decodeURIComponent(location.hash.slice(1)));if(c)c.scrollIntoView()});
pick('controls').hidden=false;filter();
"""
