// Shows a token's alternatives in a tooltip, and filters samples. A token's row (see `browser._rows`) is found by
// `data-s` of its paragraph and its own `data-i`. All text from samples and vocabularies is set through textContent.
const pick = id => document.getElementById(id);
const data = JSON.parse(pick("data").textContent);
const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
const digits = x => x >= 0.0001 || x === 0 ? x.toFixed(4) : x.toExponential(1);
const pop = document.body.appendChild(make("div", "", "pop"));
Object.assign(pop, { id: "pop", role: "tooltip", hidden: true });
let current = null, pinned = false;

function line(id, p, target) {
  const row = make("div", "", id === target ? "row this" : "row"), cell = make("span"), bar = make("i");
  bar.style.width = `${(100 * p).toFixed(2)}%`;
  cell.append(bar);
  row.append(make("span", data.names[id]), cell, make("span", digits(p)));
  return row;
}
function show(token) {
  if (token === current) return;
  hide();
  current = token;
  const [target, logProb, entropy, tail, ids, probs, more, moreMass, sampled, times, samples, gain] =
    data.sequences[token.parentNode.dataset.s][token.dataset.i];
  const note = text => pop.append(make("small", text));
  pop.replaceChildren(make("b", data.names[target]));
  note(`p ${digits(Math.exp(logProb))} · log p ${logProb.toFixed(3)} · entropy ${entropy.toFixed(3)} nats`);
  if (gain != null) note(`the image adds ${gain.toFixed(2)} to log p`.replace("-", "−"));
  ids.forEach((id, i) => pop.append(line(id, probs[i], target)));
  if (!ids.includes(target)) pop.append(line(target, Math.exp(logProb), target));
  if (more) note(`${more.toLocaleString("en")} more in the top-k: ${digits(moreMass)}`);
  note(`outside the top-k: ${digits(tail)}`);
  const shown = sampled.map((id, i) => data.names[id] + (times[i] > 1 ? ` ×${times[i]}` : "")).join(", ");
  if (samples) note(`tail samples: ${shown}${times.reduce((a, b) => a + b, 0) < samples ? " …" : ""}`);
  pop.hidden = false;
  token.classList.add("on");
  token.setAttribute("aria-describedby", "pop");
  place();
}
function place() {
  if (!current) return;
  const at = current.getClientRects()[0], w = pop.offsetWidth, h = pop.offsetHeight;
  const below = at.bottom + 6 + h < innerHeight || at.top < h + 6;
  pop.style.left = `${Math.max(8, Math.min(at.left, innerWidth - w - 8))}px`;
  pop.style.top = `${Math.max(8, below ? Math.min(at.bottom + 6, innerHeight - h - 8) : at.top - h - 6)}px`;
}
function hide() {
  current?.classList.remove("on");
  current?.removeAttribute("aria-describedby");
  current = null;
  pinned = false;
  pop.hidden = true;
}
const on = (kind, act) => document.addEventListener(kind, e => act(e.target.closest?.(".tokens .t"), e));
on("pointerover", (token, e) => { if (!pinned) token ? show(token) : e.target.closest(".pop") || hide(); });
on("click", (token, e) => { if (token) { show(token); pinned = true; } else if (!e.target.closest(".pop")) hide(); });
on("focusin", token => { if (token) { pinned = false; show(token); } });
on("focusout", () => { if (!pinned) hide(); });
on("keydown", (token, e) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (e.key === "Escape") hide();
  if (!token || !step) return;
  const all = [...token.closest(".sample").querySelectorAll(".tokens .t")], next = all[all.indexOf(token) + step];
  if (next) { e.preventDefault(); next.focus(); }
});
addEventListener("scroll", place, { passive: true });
document.querySelectorAll(".tokens").forEach(p => p.querySelectorAll(".t").forEach((token, i) => {
  token.removeAttribute("title");
  token.tabIndex = i ? -1 : 0;
}));

const cards = [...document.querySelectorAll(".sample")], filters = ["why", "source", "find"].map(pick).filter(Boolean);
const value = id => pick(id)?.value ?? "";
function filter() {
  hide();
  const words = value("find").toLowerCase();
  cards.forEach(card => card.hidden = !((!value("why") || card.dataset.why.split(" ").includes(value("why"))) &&
    (!value("source") || card.dataset.source === value("source")) && card.textContent.toLowerCase().includes(words)));
  pick("count").textContent = `${cards.filter(card => !card.hidden).length} of ${cards.length} samples`;
}
filters.forEach(each => each.addEventListener("input", filter));
addEventListener("hashchange", () => {
  filters.forEach(each => each.value = "");
  filter();
  pick(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
});
pick("controls").hidden = false;
filter();
