// Draws every `.curves` element with uPlot, from the JSON of its `data-chart`, in the page's colours.
const charts = [...document.querySelectorAll(".curves")].map(box => ({ box, data: JSON.parse(box.dataset.chart) }));
const round = x => x == null ? "–" : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(4));
const tick = x => x == null ? "" : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential().replace("e-", "e−") :
  x.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });

function draw(chart) {
  const { box, data } = chart, css = name => getComputedStyle(box).getPropertyValue(name).trim();
  const axis = (label, more) => ({ label, stroke: css("--soft"), font: "12px system-ui", labelFont: "12px system-ui",
    labelSize: 20, grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, ...more });
  const values = data.series.flatMap(each => each.values).filter(value => value !== null);
  const decades = Math.min(...values) > 0 && Math.max(...values) >= 100 * Math.min(...values);
  if (chart.plot) chart.plot.destroy();
  chart.plot = new uPlot({
    width: box.clientWidth, height: 280,
    scales: { x: { time: false }, y: decades ? { distr: 3 } : {} },
    axes: [axis("step", { size: 30, values: (_, at) => at.map(tick) }),
      axis(data.unit, { size: 58, values: (_, at) => at.map(tick) })],
    series: [{ label: "step", value: (_, x) => round(x) }, ...data.series.map(each => ({
      label: each.name, stroke: css(`--series-${each.colour % 8}`), width: 2, spanGaps: true,
      points: { show: values.length < 3 * data.series.length }, value: (_, y) => round(y) }))],
  }, [data.steps, ...data.series.map(each => each.values)], box);
}
charts.forEach(draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
addEventListener("resize", () => charts.forEach(({ box, plot }) => plot.setSize({ width: box.clientWidth, height: 280 })));
