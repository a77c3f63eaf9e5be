// The charts of a report, from the data that the page carries.

// --- where the cost goes

function moduleTree(modules, layers, kind) {
  const nodes = new Map([["", { id: "", label: "network", parent: null, own: 0, before: 0, after: 0 }]]);
  const reach = (path) => {
    if (nodes.has(path)) return nodes.get(path);
    const cut = path.lastIndexOf(".");
    const node = { id: path, label: path.slice(cut + 1), parent: reach(path.slice(0, Math.max(cut, 0))).id, own: 0, before: 0, after: 0 };
    nodes.set(path, node);
    return node;
  };
  modules.layer.forEach((layer, at) => {
    const node = reach(layers[layer]);
    node.own += modules[kind][at];
    for (let up = node; up; up = up.parent === null ? null : nodes.get(up.parent)) {
      up.total = (up.total || 0) + modules[kind][at];
      up.before += modules.macs[at];
      up.after += modules.after ? modules.after[at] : 0;
    }
  });
  return [...nodes.values()].filter((node) => node.total > 0);
}

function drawTreemap(data, of) {
  const kind = document.querySelector("input[name=cost]:checked").value;
  const nodes = moduleTree(data.modules, data.layers, kind), total = nodes[0]?.total || 1;
  const unit = { macs: "MACs", params: "parameters", bytes: "bytes", time: "ms" }[kind];
  const amount = (value) => (kind === "time" ? `${value.toPrecision(3)} ms` : `${value.toLocaleString("en-US")} ${unit}`);
  const kept = (node) => (node.before ? node.after / node.before : 1);
  const says = (node) => {
    const lines = [`<b>${verbatim(node.id || "network")}</b>`, amount(node.total), `${((100 * node.total) / total).toFixed(1)}% of the network`];
    if (data.slim && node.before) lines.push(`${(100 * kept(node)).toFixed(1)}% of its MACs kept`);
    return lines.join("<br>");
  };
  const trace = {
    type: "treemap",
    branchvalues: "remainder",
    ids: nodes.map((node) => `/${node.id}`),
    labels: nodes.map((node) => verbatim(node.label)),
    parents: nodes.map((node) => (node.parent === null ? "" : `/${node.parent}`)),
    values: nodes.map((node) => node.own),
    text: nodes.map((node) => `${((100 * node.total) / total).toFixed(1)}%`),
    textinfo: "label+text",
    customdata: nodes.map(says),
    hovertemplate: "%{customdata}<extra></extra>",
    textfont: { color: data.slim ? nodes.map((node) => (kept(node) < 0.55 ? "#ffffff" : "#10131a")) : of("page") },
    marker: {
      line: { width: 1, color: of("page") },
      pad: { t: 20, l: 3, r: 3, b: 3 },
      ...(data.slim
        ? { colors: nodes.map(kept), colorscale: "Viridis", cmin: 0, cmax: 1, showscale: false }
        : { colors: nodes.map(() => of("kept")) }),
    },
    root: { color: of("panel") },
    pathbar: { visible: true, thickness: 24, textfont: { size: 13 } },
    tiling: { pad: 2 },
  };
  return [[trace], layoutOf(of, { margin: { l: 0, r: 0, t: 26, b: 0 } })];
}

// --- saliency

function drawBoxes(data, of) {
  const shown = data.groups.map((group, at) => ({ ...group, at })).filter((group) => group.quantiles.length === 5 && group.state !== "frozen");
  const positive = shown.flatMap((group) => group.quantiles).filter((value) => value > 0);
  const least = Math.min(...positive), logarithmic = Math.max(...positive) > 30 * least;
  const on = (value) => (logarithmic ? Math.max(value, least) : value);
  const says = { kept: "free", stuck: "capacity bottleneck" };
  const stateOf = (group) => (group.state === "stuck" ? "stuck" : "kept");
  const traces = ["kept", "stuck"].map((state) => {
    const groups = shown.filter((group) => stateOf(group) === state), at = (place) => groups.map((group) => on(group.quantiles[place]));
    return {
      type: "box",
      name: says[state],
      x: groups.map((group) => group.at + 1),
      lowerfence: at(0), q1: at(1), median: at(2), q3: at(3), upperfence: at(4),
      customdata: groups.map((group) => verbatim(group.name)),
      hoverinfo: "skip",
      line: { color: of(state), width: 1 },
      fillcolor: of(state),
      whiskerwidth: 0,
      boxpoints: false,
    };
  });
  // a box says five numbers in five labels; one invisible point says them in one
  const number = (value) => value.toPrecision(3);
  traces.push({
    type: "scatter", mode: "markers", x: shown.map((group) => group.at + 1), y: shown.map((group) => on(group.quantiles[2])),
    marker: { opacity: 0 },
    text: shown.map((group) => `<b>${verbatim(group.name)}</b><br>median ${number(group.quantiles[2])}` +
      `<br>middle half ${number(group.quantiles[1])} to ${number(group.quantiles[3])}<br>5% to 95%: ${number(group.quantiles[0])} to ${number(group.quantiles[4])}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const layout = layoutOf(of, {
    xaxis: { title: { text: "group, in depth order" }, range: [0, data.groups.length + 1], showgrid: false },
    yaxis: { title: { text: "saliency of a unit" }, exponentformat: "power", ...(logarithmic ? { type: "log", dtick: 1 } : { rangemode: "tozero" }) },
    boxmode: "overlay", boxgap: 0.35, hovermode: "x", hoverdistance: 30,
  });
  return [traces, layout];
}

const SHOWN_BELOW_PLAN = 0.5;

function drawCurve(data, of) {
  const { curve } = data, [kept, lost] = curve.chosen, percent = (share) => `${(100 * share).toFixed(1)}%`;
  // losses grow without bound towards nothing kept, and would press the part that matters onto the axis
  const end = SHOWN_BELOW_PLAN * kept;
  function near(points) {
    const shown = points.filter(([share]) => share >= end), [after, before] = [points[shown.length], shown.at(-1)];
    if (!after || !before) return shown;
    return [...shown, [end, before[1] + ((after[1] - before[1]) * (before[0] - end)) / (before[0] - after[0])]];
  }
  const line = (points, name, style) => ({
    type: "scatter", mode: "lines", name, line: style,
    x: near(points).map(([share]) => 100 * share), y: near(points).map(([, loss]) => loss),
    text: near(points).map(([share, loss]) => `${name}<br>${percent(share)} of the ${curve.kind} kept<br>saliency lost ${loss.toPrecision(3)}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const chosen = {
    type: "scatter", mode: "markers", name: `this plan: ${percent(kept)}`, x: [100 * kept], y: [lost],
    marker: { color: of("stuck"), size: 12, line: { color: of("page"), width: 2 } },
    cliponaxis: false,
    hovertemplate: `this plan<br>${percent(kept)} of the ${curve.kind} kept<br>saliency lost ${lost.toPrecision(3)}<extra></extra>`,
  };
  const traces = [
    line(curve.uniform, "same fraction everywhere", { color: of("faint"), width: 2, dash: "dash" }),
    line(curve.best, "best widths", { color: of("kept"), width: 3 }),
    chosen,
  ];
  const layout = layoutOf(of, {
    xaxis: { title: { text: `${curve.kind} kept` }, ticksuffix: "%", range: [102, 100 * end] },
    yaxis: { title: { text: "saliency lost" }, rangemode: "tozero", exponentformat: "power" },
    hovermode: "closest",
    showlegend: true,
    legend: { x: 0.02, y: 0.98, xanchor: "left", yanchor: "top", bgcolor: "rgba(0,0,0,0)" },
  });
  return [traces, layout];
}

// --- training

function drawLearning(data, of) {
  const { dense, runs } = data.training, percent = (share) => `${(100 * share).toFixed(1)}%`;
  const starts = runs.map((_, at) => runs.slice(0, at).reduce((sum, run) => sum + run.epochs.length, 0));
  const end = starts.at(-1) + runs.at(-1).epochs.length;
  const epochs = (run, at, value) =>
    run.epochs.map((row, epoch) => ({ x: starts[at] + epoch + 1, y: row[value], where: `${run.name}, epoch ${epoch + 1}` }));
  // what is measured while a network learns belongs to that training alone, hence the gaps
  const apart = (value) => runs.flatMap((run, at) => [...epochs(run, at, value), { x: starts[at] + run.epochs.length, y: null, where: "" }]);
  const evaluated = runs.flatMap((run, at) => [{ x: starts[at], y: run.before, where: `before ${run.name}` }, ...epochs(run, at, 2)])
    .filter((point) => point.y !== null);
  const line = (name, all, yaxis, style, says) => ({
    type: "scatter", mode: "lines+markers", name, yaxis, ...style,
    x: all.map((point) => point.x), y: all.map((point) => point.y),
    text: all.map((point) => `${verbatim(point.where)}<br>${name} ${point.y === null ? "" : says(point.y)}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const trained = apart(1), learns = trained.some((point) => point.y !== null), measured = evaluated.length > 0 || learns;
  const traces = [];
  if (evaluated.length) traces.push(line("accuracy, evaluated", evaluated, "y2", { line: { color: of("kept"), width: 3 }, marker: { size: 7 } }, percent));
  if (learns) traces.push(line("accuracy in training", trained, "y2", { line: { color: of("faint"), width: 1.5, dash: "dot" }, marker: { size: 5 } }, percent));
  if (measured && dense !== null) {
    traces.push({
      type: "scatter", mode: "lines", name: "dense original", yaxis: "y2", x: [0, end], y: [dense, dense],
      line: { color: of("text"), width: 1.5, dash: "dash" }, hovertemplate: `dense original ${percent(dense)}<extra></extra>`,
    });
  }
  traces.push(line("loss", apart(0), "y", { line: { color: of("stuck"), width: 2 }, marker: { size: 5 } }, (value) => value.toPrecision(4)));
  const top = { xref: "x", yref: "paper", y: 1, yanchor: "bottom", showarrow: false, font: { size: 12 } };
  const layout = layoutOf(of, {
    margin: { l: 56, r: 8, t: 56, b: 44 },
    xaxis: { title: { text: "epoch" }, range: [-0.02 * end, 1.02 * end], showgrid: false, anchor: "y", dtick: end <= 12 ? 1 : undefined },
    yaxis: { title: { text: "loss" }, domain: measured ? [0, 0.34] : [0, 1] },
    hovermode: "closest",
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.09, xanchor: "left", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    shapes: starts.slice(1).map((x) => ({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: of("faint"), width: 1, dash: "dot" } })),
    annotations: runs.length > 1 ? runs.map((run, at) => ({ ...top, x: starts[at] + run.epochs.length / 2, text: verbatim(run.name) })) : [],
  });
  if (measured) layout.yaxis2 = { ...layout.yaxis, title: { ...layout.yaxis.title, text: "top-1 accuracy" }, domain: [0.42, 1], tickformat: ".0%" };
  return [traces, layout];
}

function liveCharts(data) {
  const makers = { treemap: drawTreemap, boxes: drawBoxes, curve: drawCurve, learning: drawLearning };
  const drawn = Object.entries(makers).map(([id, make]) => [id, (of) => make(data, of)]);
  keepDrawn(Object.fromEntries(drawn), "input[name=cost]");
}

