// The pictures of a comparison, drawn by what plotly.js has.

const OKABE_ITO = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
const VIRIDIS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const NAMED_IN_PLOT = 12;

// one scale for results that have an order, away from the end that the page's own colour swallows
function coloursOf(data, dark) {
  if (!data.ordered) return data.names.map((_, at) => OKABE_ITO[at % OKABE_ITO.length]);
  const [from, to] = dark ? [0.35, 1] : [0, 0.78], order = [...data.kept].sort((a, b) => a - b);
  return data.kept.map((kept) => {
    const place = order.length > 1 ? order.indexOf(kept) / (order.length - 1) : 0, at = (from + (to - from) * place) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    return `rgb(${VIRIDIS[low].map((part, of) => Math.round(part + (VIRIDIS[low + 1][of] - part) * (at - low))).join(",")})`;
  });
}

const markerOf = (data, at) => (data.ordered ? "circle" : MARKERS[at % MARKERS.length]);
const dashOf = (data, at) => (data.ordered ? "solid" : ["solid", "dash", "dot", "dashdot"][Math.floor(at / OKABE_ITO.length) % 4]);
const chosenOf = (name, all) => {
  const checked = document.querySelector(`input[name=${name}]:checked`);
  return all.find((axis) => checked && axis.kind === checked.value) ?? all[0];
};

function drawPareto(data, of, colours) {
  const cost = chosenOf("cost", data.costs), quality = chosenOf("quality", data.qualities);
  const scale = quality.kind === "accuracy" ? 100 : 1, front = data.fronts[`${quality.kind} ${cost.kind}`];
  const number = (value) => (quality.kind === "accuracy" ? `${(100 * value).toFixed(1)}%` : value.toPrecision(4));
  const places = front.map((name) => data.names.indexOf(name)), labels = data.names.length <= NAMED_IN_PLOT;
  const says = (name, kept, value) => `<b>${verbatim(name)}</b><br>${(100 * kept).toFixed(1)}% of the ${verbatim(cost.name)}<br>${verbatim(quality.name)}: ${number(value)}`;
  const line = {
    type: "scatter", mode: "lines", x: places.map((at) => 100 * cost.values[at]), y: places.map((at) => scale * quality.values[at]),
    line: { color: of("faint"), width: 1.5 }, hoverinfo: "skip",
  };
  const points = {
    type: "scatter", mode: labels ? "markers+text" : "markers", cliponaxis: false,
    x: cost.values.map((value) => 100 * value), y: quality.values.map((value) => scale * value),
    text: data.names.map(verbatim), textposition: quality.kind === "accuracy" ? "bottom right" : "top right", textfont: { size: 12, color: of("text") },
    marker: {
      size: 12, line: { width: 2, color: colours }, symbol: data.names.map((_, at) => markerOf(data, at)),
      color: data.names.map((name, at) => (front.includes(name) ? colours[at] : of("page"))),
    },
    customdata: data.names.map((name, at) => says(name, cost.values[at], quality.values[at])),
    hovertemplate: "%{customdata}<extra></extra>",
  };
  const traces = [line, points];
  if (quality.dense !== null) traces.push({
    type: "scatter", mode: "markers+text", cliponaxis: false, x: [100], y: [scale * quality.dense], text: ["dense"],
    textposition: quality.kind === "accuracy" ? "top left" : "top left", textfont: { size: 12, color: of("faint") },
    marker: { size: 11, symbol: "x-thin", line: { width: 2, color: of("faint") } },
    customdata: [says("dense network", 1, quality.dense)], hovertemplate: "%{customdata}<extra></extra>",
  });
  document.getElementById("better").textContent = quality.kind === "accuracy" ? "Up and to the left is better." : "Down and to the left is better.";
  const title = { text: quality.name, standoff: 14 };
  const layout = layoutOf(of, {
    xaxis: { title: { text: `${cost.name} kept` }, ticksuffix: "%" },
    yaxis: quality.kind === "accuracy" ? { title, ticksuffix: "%" } : { title, rangemode: "tozero", exponentformat: "power" },
    hovermode: "closest", margin: { l: 64, r: 24, t: 20, b: 48 },
  });
  return [traces, layout];
}

function drawOverlay(data, of, colours) {
  const names = data.groups.map((group) => verbatim(group.name)), share = (group, at) => (group.kept[at] === null ? null : (100 * group.kept[at]) / group.units);
  const traces = data.names.map((name, at) => ({
    type: "scatter", mode: data.groups.length > 1 ? "lines" : "markers", name: verbatim(name), x: names,
    y: data.groups.map((group) => (group.units ? share(group, at) : null)),
    // the first are drawn thicker, so that what lies below another line shows on both its sides
    line: { color: colours[at], width: 1.5 + (3 * (data.names.length - 1 - at)) / data.names.length, shape: "hvh", dash: dashOf(data, at) }, marker: { color: colours[at], size: 10 },
    customdata: data.groups.map((group) => `${group.kept[at]} of ${group.units}`),
    hovertemplate: "%{y:.1f}% (%{customdata})",
  }));
  const room = (document.getElementById("overlay").clientWidth - 64) / names.length, LETTER = 8;
  const starts = [];
  data.stages.reduce((at, [groups, label]) => {
    const last = starts.at(-1);
    if (label && (!last || (at - last.at) * room > (LETTER * (label.length + last.label.length + 1)) / 2)) starts.push({ at, label });
    return at + groups;
  }, 0);
  const layout = layoutOf(of, {
    xaxis: {
      type: "category", showgrid: true, range: [-0.5, names.length - 0.5], tickangle: 0,
      tickvals: starts.map((stage) => names[stage.at]), ticktext: starts.map((stage) => verbatim(stage.label)),
    },
    yaxis: { title: { text: "channels kept", standoff: 14 }, ticksuffix: "%", rangemode: "tozero" },
    hovermode: "x unified", hoverlabel: { bgcolor: of("panel"), bordercolor: of("line"), font: { color: of("text") } },
    showlegend: true, legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    margin: { l: 56, r: 8, t: 12, b: 44 },
  });
  return [traces, layout];
}

function liveComparison(data) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => system.matches && !document.documentElement.classList.contains("paper");
  const begin = () => {
    const colours = coloursOf(data, isDark());
    for (const key of document.querySelectorAll(".key")) key.style.background = colours[Number(key.dataset.result)];
    return [colours];
  };
  const makers = { pareto: (of, colours) => drawPareto(data, of, colours), overlay: (of, colours) => drawOverlay(data, of, colours) };
  keepDrawn(makers, ".switch input", begin);
}

liveTables();
liveComparison(JSON.parse(document.getElementById("data").textContent));
