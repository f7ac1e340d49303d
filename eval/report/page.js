// Shows differences from the chosen baseline, and answers on which it and other runs disagree. Text is set as text only.
const data = JSON.parse(document.getElementById("samples").textContent), several = data.runs.length > 1;
const all = name => [...document.querySelectorAll(`select.${name}`)], chosen = name => +(all(name)[0]?.value ?? 0);
const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
const fill = (name, options) => all(name).forEach(box => options.forEach(([text, value]) => box.append(new Option(text, value))));
fill("task", data.tasks.map((each, i) => [each.task, i]));
fill("baseline", data.runs.map((run, i) => [run, i]));
fill("other", [["every other", -1], ...data.runs.map((run, i) => [run, i])]);

function answer(run, { text, read, right }) {
  const box = make("div"), key = make("span", "", "key");
  key.style.background = `var(--series-${run % 8})`;
  box.append(key, make("b", `${data.runs[run]}: `), make("span", text || "(empty)", right >= 1 ? "right" : right <= 0 ? "wrong" : ""),
    make("small", `read as: ${read || "nothing"} · ${(100 * right).toFixed(0)} %`));
  return box;
}
function card(sample, runs) {
  const box = make("div", "", "card"), reference = make("p", "", "reference");
  if (sample.image) box.append(Object.assign(make("img"), { src: sample.image, alt: sample.name, loading: "lazy" }));
  reference.append(make("b", "reference: "), make("span", sample.reference || "(none)"));
  box.append(make("small", sample.id), make("pre", sample.prompt), reference,
    ...runs.filter(run => sample.answers[run]).map(run => answer(run, sample.answers[run])));
  return box;
}
function show() {
  const [baseline, other] = ["baseline", "other"].map(chosen), samples = data.tasks[chosen("task")]?.samples ?? [];
  const others = other >= 0 ? [other] : data.runs.map((_, i) => i).filter(i => i !== baseline);
  const differs = (answers, run) => answers[run] && answers[baseline] && answers[run].right !== answers[baseline].right;
  const found = several ? samples.filter(({ answers }) => others.some(run => differs(answers, run))) : samples;
  document.getElementById("count").textContent = `${found.length} shown`;
  const runs = several ? [...new Set([baseline, ...others])] : [0];
  document.getElementById("cards").replaceChildren(...found.map(sample => card(sample, runs)));
  document.querySelectorAll(".gap").forEach(box => { box.textContent = JSON.parse(box.dataset.gaps)[baseline]; });
  document.querySelectorAll("tr.run").forEach((row, i) => {
    row.querySelectorAll(".gap").forEach(box => { box.hidden = i === baseline; });
  });
}
["task", "baseline", "other"].flatMap(all).forEach(box => box.addEventListener("change", () => {
  all(box.className).forEach(same => { same.value = box.value; });
  show();
}));
show();
