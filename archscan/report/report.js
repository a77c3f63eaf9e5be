// Tables that sort, filter and copy themselves, and one tip for everything that is pointed at.
// Without a script the page shows the same rows in depth order, and titles in place of tips.

function liveTables() {
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const value = (row, column) => {
    const cell = row.cells[column];
    if (!("sort" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.sort === "" ? -Infinity : Number(cell.dataset.sort);
  };
  function sortBy(table, header) {
    const body = table.tBodies[0], column = header.cellIndex, rows = [...body.rows];
    const first = rows.length && typeof value(rows[0], column) === "number" ? -1 : 1;
    const now = { ascending: 1, descending: -1 }[header.getAttribute("aria-sort")];
    const sign = now ? -now : first;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...rows.sort((a, b) => sign * compare(value(a, column), value(b, column))));
  }
  function csvOf(table) {
    const names = [...table.tHead.rows[0].cells], chosen = names.map((_, at) => at).filter((at) => !names[at].classList.contains("drawing"));
    const quoted = (text) => {
      // a spreadsheet would run what begins like a formula, and names come from models that other people made
      const safe = /^[=+@\t\r-]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
      return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const cell = (row, at) => row.cells[at].dataset.sort ?? row.cells[at].textContent.trim().replace(/\s+/g, " ");
    const head = chosen.map((at) => quoted(names[at].dataset.csv || names[at].textContent.trim()));
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => chosen.map((at) => quoted(cell(row, at))));
    return [head, ...rows].map((line) => line.join(",")).join("\n") + "\n";
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      if (header.classList.contains("drawing")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sortBy(table, header));
    }
    const tools = document.querySelector(`.tools[data-for="${table.id}"]`);
    const [filter, button, said] = [".filter", ".copy", ".said"].map((name) => tools.querySelector(name));
    tools.hidden = false;
    const rows = [...table.tBodies[0].rows];
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      const shown = rows.filter((row) => !row.hidden).length;
      said.textContent = wanted ? `${shown} of ${rows.length} rows` : "";
    });
    button.addEventListener("click", async () => {
      const shown = rows.filter((row) => !row.hidden).length;
      said.textContent = (await copy(csvOf(table))) ? `${shown} rows copied` : "the browser does not let this page copy";
    });
  }
}

function showTip(target, lines) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  tip.hidden = false;
  const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left + box.width / 2 - own.width / 2, document.documentElement.clientWidth - own.width - 8));
  const top = box.top - own.height - 10 < 0 ? box.bottom + 10 : box.top - own.height - 10;
  tip.style.translate = `${left}px ${top}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

function liveBars(data) {
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const MEMBERS = 6;
  for (const bar of document.querySelectorAll(".chart a[data-group]")) {
    const group = data.groups[Number(bar.dataset.group)];
    const members = group.members.slice(0, MEMBERS).map((layer) => data.layers[layer]);
    const more = group.members.length - members.length;
    const width = data.slim
      ? `${group.units} → ${group.kept} channels, ${percent(group.units ? group.kept / group.units : 1)} kept`
      : `${group.units} channels`;
    const state = { frozen: `frozen: ${group.reason}`, stuck: "capacity bottleneck", wider: "wider than before" }[group.state];
    const lines = [group.name, width, ...(state ? [state] : []), `${percent(group.macs)} of the MACs, ${percent(group.params)} of the parameters`];
    lines.push(`${group.members.length} layers: ${members.join(", ")}${more > 0 ? ` and ${more} more` : ""}`);
    bar.setAttribute("aria-label", lines.slice(0, 2).join(": "));
    bar.querySelector("title").remove();
    bar.addEventListener("pointerenter", () => showTip(bar, lines));
    bar.addEventListener("pointerleave", hideTip);
  }
}
