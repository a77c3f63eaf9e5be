// Where boxes and lines of the graph go. Along: the longest path over the layers that lead forwards, so that a residual
// stream stands between the blocks that read and write it. Across: each column in the order of what it is joined to.
// Wide pages run from left to right, narrow ones from top to bottom.

const THICK = 16, TALLEST_PX = 1400;

function joinedItems(items, links) {
  const itemOf = new Map(), edges = new Map();
  items.forEach((item, at) => item.groups.forEach((number) => itemOf.set(number, at)));
  const ends = (numbers) => [...new Set(numbers.map((number) => itemOf.get(number)))];
  for (const [, reads, writes] of links) {
    for (const from of ends(reads)) {
      for (const to of ends(writes)) {
        if (from === to) continue;
        const low = Math.min(from, to), high = Math.max(from, to), key = `${low} ${high}`;
        if (!edges.has(key)) edges.set(key, { low, high, forward: false });
        edges.get(key).forward ||= from < to;
      }
    }
  }
  return [...edges.values()];
}

function columnsOf(items, edges) {
  const rank = items.map(() => 0), into = items.map(() => []), next = items.map(() => []), columns = [];
  for (const edge of edges) {
    if (edge.forward) into[edge.high].push(edge.low);
    next[edge.low].push(edge.high);
    next[edge.high].push(edge.low);
  }
  items.forEach((_, at) => {
    rank[at] = Math.max(0, ...into[at].map((from) => rank[from] + 1));
    (columns[rank[at]] ||= []).push(at);
  });
  return { rank, columns, next };
}

function rowsOf({ columns, next }) {
  const row = next.map(() => 0);
  const settle = (column) => column.forEach((at, place) => (row[at] = place - (column.length - 1) / 2));
  const mean = (numbers) => numbers.reduce((total, number) => total + number, 0) / numbers.length;
  columns.forEach(settle);
  for (let sweep = 0; sweep < 6; sweep++) {
    for (const column of sweep % 2 ? [...columns].reverse() : columns) {
      const wish = new Map(column.map((at) => [at, next[at].length ? mean(next[at].map((to) => row[to])) : row[at]]));
      column.sort((a, b) => wish.get(a) - wish.get(b) || a - b);
      settle(column);
    }
  }
  return row;
}

function networkLayout(items, edges, space, widthOf) {
  const found = columnsOf(items, edges), row = rowsOf(found), upright = space < 600;
  const ranks = found.columns.length, rows = Math.max(...found.columns.map((column) => column.length));
  const along = upright ? Math.max(18, Math.min(46, TALLEST_PX / ranks)) : Math.max(18, Math.min(150, space / (ranks + 0.4)));
  const across = upright ? Math.max(26, Math.min(90, space / (rows + 0.4))) : Math.max(24, Math.min(62, 520 / rows));
  const thick = Math.min(THICK, along * 0.6), widths = items.map((item) => widthOf(item) / item.groups.length);
  const widest = Math.max(...widths);
  const spots = items.map((_, at) => ({
    along: (found.rank[at] + 0.7) * along,
    across: row[at] * across,
    length: Math.max(5, across * (upright ? 0.7 : 0.62) * Math.sqrt(widths[at] / widest)),
    thick,
  }));
  return { spots, upright, along, across };
}

// The path of a line: straight into the next column, in an arc past the columns between, the deeper the longer.
function course(edge, layout) {
  const [a, b] = [layout.spots[edge.low], layout.spots[edge.high]].sort((one, other) => one.along - other.along);
  const start = a.along + a.thick / 2, end = b.along - b.thick / 2, steps = Math.round((b.along - a.along) / layout.along);
  const arc = steps > 1 ? (edge.forward ? -1 : 1) * Math.min(110, 10 + 11 * steps) : steps < 1 ? 30 : 0;
  const bend = Math.max(4, (end - start) / 2.4);
  const point = (along, across) => (layout.upright ? [across, along] : [along, across]).map((value) => value.toFixed(1)).join(" ");
  return `M${point(start, a.across)}C${point(start + bend, a.across + arc)} ${point(end - bend, b.across + arc)} ${point(end, b.across)}`;
}
