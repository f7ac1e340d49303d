// Draws every `.curves` element with uPlot, from the JSON of its `data-chart`, in the page's colours.
const charts = [...document.querySelectorAll(".curves")].map(box => ({ box, data: JSON.parse(box.dataset.chart) }));
const round = x => x == null ? "–" : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(4));
const tick = x => x == null ? "" : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential().replace("e-", "e−") :
  x.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
const whole = [...Array(10).keys()].flatMap(power => [1, 2, 5].map(digit => digit * 10 ** power));
const isRound = x => x != null && /^[125]e/.test(x.toExponential(3).replace(".000", ""));

function draw(chart) {
  const { box, data } = chart, css = name => getComputedStyle(box).getPropertyValue(name).trim();
  const axis = (label, more) => ({ label, stroke: css("--soft"), font: "12px system-ui", labelFont: "12px system-ui",
    labelSize: 20, grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, ...more });
  const points = Math.max(...data.series.map(each => each.values.filter(value => value !== null).length));
  // At rest the legend shows each curve's last value; under the pointer, the value there.
  const last = values => values[values.findLastIndex(value => value !== null)];
  if (chart.plot) chart.plot.destroy();
  chart.plot = new uPlot({
    width: box.clientWidth, height: 280,
    scales: { x: { time: false }, y: data.log ? { distr: 3, range: (_, low, high) => [low / 1.1, high * 1.1] } :
      { range: (_, low, high) => low < high ? uPlot.rangeNum(low, high, 0.1, true) : [low - (low && 1), low + 1] } },
    axes: [axis("step", { size: 30, incrs: whole, values: (_, at) => at.map(tick) }),
      axis(data.log ? `${data.unit}, logarithmic` : data.unit,
        { size: 58, values: (_, at) => at.map(x => data.log && !isRound(x) ? "" : tick(x)) })],
    series: [{ label: "step", value: (_, x, __, at) => at == null ? `${round(data.steps.at(-1))} (last)` : round(x) },
      ...data.series.map(each => ({
        label: each.name, stroke: css(`--series-${each.colour % 8}`), width: 2, spanGaps: true,
        points: { show: points < 3 }, value: (_, y, __, at) => round(at == null ? last(each.values) : y) }))],
  }, [data.steps, ...data.series.map(each => each.values)], box);
}
charts.forEach(draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
addEventListener("resize", () => charts.forEach(({ box, plot }) => plot.setSize({ width: box.clientWidth, height: 280 })));
