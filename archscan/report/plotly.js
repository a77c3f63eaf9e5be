// Charts by Plotly, which the page carries compressed: unpacked here, drawn in the page's own colours, and drawn anew
// where those change, which is at dusk and on paper.

async function unpack(id) {
  const letters = atob(document.getElementById(id).textContent), packed = new Uint8Array(letters.length);
  for (let at = 0; at < packed.length; at++) packed[at] = letters.charCodeAt(at);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

// Plotly reads some markup in texts; names are to be read as they are
const verbatim = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function layoutOf(of, more) {
  const text = { tickfont: { size: 12 }, title: { font: { size: 13 } } };
  const axis = { ...text, gridcolor: of("line"), zeroline: false, linecolor: of("line"), tickcolor: of("line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    margin: { l: 56, r: 8, t: 8, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: of("faint"), size: 13, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: of("text"), bordercolor: of("text"), font: { color: of("page") }, align: "left" },
    showlegend: false,
    dragmode: false,
    ...rest,
    xaxis: { ...axis, ...xaxis, title: { ...axis.title, ...xaxis.title } },
    yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...yaxis.title } },
  };
}

// --- when to draw

const PAPER_WIDTH = 680;

// Each maker gives the traces and the layout of the place whose id it has; `begin` runs before them, each time anew.
async function keepDrawn(makers, choices, begin = () => []) {
  const places = Object.keys(makers).filter((id) => document.getElementById(id));
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const draw = (width) => {
    const more = begin();
    for (const id of places) {
      const [traces, layout] = makers[id](palette(), ...more);
      Plotly.react(id, traces, width ? { ...layout, width } : { ...layout, autosize: true }, config);
    }
  };
  if (places.length) await unpack("plotly");
  draw();
  for (const choice of document.querySelectorAll(choices)) choice.addEventListener("change", () => draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    draw(PAPER_WIDTH);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
    draw();
  });
}

