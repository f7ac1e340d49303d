// Shows the samples of a benchmark on which two chosen runs disagree. All text is set through textContent.
const pick = id => document.getElementById(id);
const data = JSON.parse(pick("samples").textContent);
const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
const fill = (id, names) => names.forEach((name, i) => pick(id).append(new Option(name, i)));
fill("task", data.tasks.map(each => each.task));
fill("a", data.runs);
fill("b", data.runs);
pick("b").value = 1;

function card(sample, runs) {
  const box = make("div", "", "card");
  if (sample.image) box.append(Object.assign(make("img"), { src: sample.image, alt: sample.name, loading: "lazy" }));
  box.append(make("small", sample.id), make("pre", sample.prompt));
  for (const run of runs) {
    const { text, read, right } = sample.answers[run], answer = make("div"), key = make("span", "", "key");
    key.style.background = `var(--series-${run % 8})`;
    answer.append(key, make("b", `${data.runs[run]}: `),
      make("span", text || "(empty)", right >= 1 ? "right" : right <= 0 ? "wrong" : ""),
      make("small", `read as: ${read || "nothing"} · ${(100 * right).toFixed(0)} %`));
    box.append(answer);
  }
  return box;
}
function show() {
  const [a, b, task] = ["a", "b", "task"].map(id => +pick(id).value), samples = data.tasks[task]?.samples ?? [];
  const found = samples.filter(({ answers }) => answers[a] && answers[b] && answers[a].right !== answers[b].right);
  pick("count").textContent = `${found.length} shown`;
  pick("cards").replaceChildren(...found.map(sample => card(sample, [a, b])));
}
["task", "a", "b"].forEach(id => pick(id).addEventListener("change", show));
show();
